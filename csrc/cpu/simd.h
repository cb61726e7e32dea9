// Vector code chosen when the program runs, so that a build made on one machine serves older ones.
#pragma once

#define KFAC2_INLINE inline __attribute__((always_inline))

// In front of a function that is not a template: compiled once for each instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && \
    !defined(KFAC2_NO_CLONES)
#define KFAC2_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KFAC2_CLONES
#endif
