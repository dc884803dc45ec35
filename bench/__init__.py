"""How fast a step is, beside torch.optim, DeepSpeed and the papers' own style of code.

    python -m bench                  everything, about ten minutes; a table, and bench/results/
    python -m bench --device cuda    on a GPU, with workloads of its size; about four minutes
    python -m bench --quick          a minute, on small tensors
    pytest bench/                    the same steps, one contender after the other, with all of
                                     pytest-benchmark's options; and whether all compute the same

There are two parts: AdamW by everybody and every decay; and, on the workloads whose names end in
`-whole`, 16-bit storage, clipping, averages and telemetry beside the same in separate passes. On
those that end in `-1-thread` AdamW has a process of its own, with OMP_NUM_THREADS=1. Those that end
in `-sharded` are FSDP2's, over several processes.

Contenders on one workload take turns, one timed step each per round, on the same weights, gradients
and state. A ratio is the median over the rounds of the ratio within a round, so what slows the
whole machine for a second or a minute slows both sides of it.

    workloads.py     what is measured: lists of tensor shapes
    contenders.py    who is measured: optimizers, and what they must move
    papers.py        decays as research repositories write them
    deepspeed.py     DeepSpeedCPUAdam, and its call for many tensors
    separate.py      clipping, AdamW, averages and norms one after the other, by torch's functions
    distributed.py   processes that share a workload
    limit.py         how fast this machine moves memory
    clock.py         the host's time, and a GPU's own
    runner.py        the rounds, and what comes of them
    test_bench.py    the same steps under pytest-benchmark
    results.py       ratios within rounds
    targets.py       what the project asks of itself
    report.py        table, JSON, Markdown
    chart.py         picture
    machine.py       what the figures depend on
"""
