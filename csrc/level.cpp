// Which instruction set is used, and its name for `luce info`.
#include <cstdlib>
#include <string>

#include "bindings.h"
#include "kernels.h"

namespace luce {
namespace {

#if defined(__x86_64__)
int detect() {
  __builtin_cpu_init();
  int level = 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2")) {
    level = 3;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      level = 4;
    }
  }
  const char* wish = std::getenv("LUCE_INSTRUCTION_SET");
  for (int lower = 2; wish && lower < level; ++lower) {
    if (std::string(wish) == "x86-64-v" + std::to_string(lower)) level = lower;
  }
  return level;
}
#else
int detect() { return 0; }
#endif

std::string instruction_set() {
#if defined(__x86_64__)
  return "x86-64-v" + std::to_string(level());
#elif defined(__aarch64__)
  return "arm64";
#else
  return "generic";
#endif
}

}  // namespace

int level() {
  static const int found = detect();
  return found;
}

STABLE_TORCH_LIBRARY_IMPL(luce, CompositeExplicitAutograd, m) { m.impl("instruction_set", TORCH_BOX(&instruction_set)); }

}  // namespace luce
