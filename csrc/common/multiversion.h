// One binary, several instruction sets: a function marked MEGAEVA_MULTIVERSION is compiled for each, and the dynamic
// loader picks the best the machine has. So nothing is built with -march=native, and a library built on one node of a
// cluster runs on all of them. Mark plain functions only, and give them MEGAEVA_INLINE templates to call.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__))
#define MEGAEVA_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGAEVA_MULTIVERSION
#endif

#define MEGAEVA_INLINE inline __attribute__((always_inline))
