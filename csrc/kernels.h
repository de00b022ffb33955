// Every kernel works on rows from `begin` to `end` and is compiled once for each instruction set: LUCE_KERNEL declares
// all its versions, LUCE_CHOOSE takes the best one that this processor runs.
#pragma once

#include <cstdint>

namespace luce {

#if defined(__x86_64__)
#define LUCE_KERNEL(name, Arguments)                                        \
  namespace v2 { void name(const Arguments&, int64_t begin, int64_t end); } \
  namespace v3 { void name(const Arguments&, int64_t begin, int64_t end); } \
  namespace v4 { void name(const Arguments&, int64_t begin, int64_t end); }
#define LUCE_CHOOSE(name) \
  (::luce::level() == 4 ? ::luce::v4::name : ::luce::level() == 3 ? ::luce::v3::name : ::luce::v2::name)
#else
#define LUCE_KERNEL(name, Arguments) \
  namespace native { void name(const Arguments&, int64_t begin, int64_t end); }
#define LUCE_CHOOSE(name) (::luce::native::name)
#endif

// The x86-64 level in use (2, 3 or 4): what the processor has, or less if LUCE_INSTRUCTION_SET says so.
int level();

}  // namespace luce
