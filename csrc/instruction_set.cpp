// Which of cpu.cpp's instruction sets this processor runs.
#include <stdexcept>

#include "cpu.h"

namespace wdk {

#define WDK_DECLARE(isa)         \
  namespace isa {                \
  void square(const CpuWork&);   \
  void maximize(const CpuWork&); \
  void update(const CpuWork&);   \
  void pull(const CpuWork&);     \
  }
WDK_DECLARE(baseline)
#ifdef WDK_X86
WDK_DECLARE(avx2)
WDK_DECLARE(avx512)
#endif
#undef WDK_DECLARE

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names{"baseline"};
#ifdef WDK_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) names.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    names.push_back("avx512");
#endif
  return names;
}

CpuLoops cpu_loops(const std::string& instruction_set) {
  for (const std::string& name : instruction_sets()) {
    if (name != instruction_set) continue;
#ifdef WDK_X86
    if (name == "avx2") return {avx2::square, avx2::maximize, avx2::update, avx2::pull};
    if (name == "avx512") return {avx512::square, avx512::maximize, avx512::update, avx512::pull};
#endif
    return {baseline::square, baseline::maximize, baseline::update, baseline::pull};
  }
  throw std::invalid_argument("instruction set '" + instruction_set +
                              "' is not in this build or not on this processor");
}

}  // namespace wdk
