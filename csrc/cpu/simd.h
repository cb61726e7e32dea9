// Vector code chosen when the program runs, so that a build made on one machine serves older ones.
#pragma once

#include <cstdint>

#define KFAC2_INLINE inline __attribute__((always_inline))

// In front of a function that is not a template: compiled once for each instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(KFAC2_NO_CLONES)
#define KFAC2_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KFAC2_CLONES
#endif

// The same for templates, by hand: a function for each instruction set, in front of it its target.
#if defined(__x86_64__) && defined(__GNUC__)
#define KFAC2_X86_DISPATCH 1
#define KFAC2_TARGET(isa) __attribute__((target(isa)))
#else
#define KFAC2_X86_DISPATCH 0
#endif

namespace kfac2::cpu {

constexpr int64_t kVectorBytes = 64;

template <typename Number>
struct VectorOf {
  typedef Number type __attribute__((vector_size(kVectorBytes)));
};

#if KFAC2_X86_DISPATCH
inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f");
  return has;
}
inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#endif

}  // namespace kfac2::cpu
