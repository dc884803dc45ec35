"""What the papers claim about weight decay, tried on a laptop: `python -m claims --help`."""
