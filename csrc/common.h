// Compiles one header of row kernels for several instruction sets, in a namespace each, and names the best one
// this processor has. Use: #define FASTALIGN_ROWS "file.h", then include this header, outside any namespace.
// The header is compiled again for each set (not only its call sites) because GCC splits wide vectors when it
// first sees a function, before it is inlined anywhere.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

namespace fastalign {

// The two narrow formats, kept as bits.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fastalign

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes a vector is inlined: no call passes one
#endif

#define FASTALIGN_ISA portable
#define FASTALIGN_BYTES 16
#include "lanes.h"
#include FASTALIGN_ROWS
#undef FASTALIGN_ISA
#undef FASTALIGN_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTALIGN_X86 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FASTALIGN_ISA avx2
#define FASTALIGN_BYTES 32
#include "lanes.h"
#include FASTALIGN_ROWS
#undef FASTALIGN_ISA
#undef FASTALIGN_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define FASTALIGN_ISA avx512
#define FASTALIGN_BYTES 64
#include "lanes.h"
#include FASTALIGN_ROWS
#undef FASTALIGN_ISA
#undef FASTALIGN_BYTES
#pragma GCC pop_options
#endif

namespace fastalign {

enum class Isa { portable, avx2, avx512 };

// The environment variable FASTALIGN_ISA (portable, avx2) asks for a lesser set than the processor has: this is how
// one machine tests all of them.
inline Isa best_isa() {
#ifdef FASTALIGN_X86
  const char* named = std::getenv("FASTALIGN_ISA");
  const std::string asked = named ? named : "";
  if (asked == "portable") {
    return Isa::portable;
  }
  if (asked != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::avx2;
  }
#endif
  return Isa::portable;
}

}  // namespace fastalign

#ifdef FASTALIGN_X86
#define FASTALIGN_CALL(function, ...)                                          \
  do {                                                                         \
    static const ::fastalign::Isa isa = ::fastalign::best_isa();               \
    if (isa == ::fastalign::Isa::avx512) {                                     \
      ::fastalign::avx512::function(__VA_ARGS__);                              \
    } else if (isa == ::fastalign::Isa::avx2) {                                \
      ::fastalign::avx2::function(__VA_ARGS__);                                \
    } else {                                                                   \
      ::fastalign::portable::function(__VA_ARGS__);                            \
    }                                                                          \
  } while (false)
#else
#define FASTALIGN_CALL(function, ...) ::fastalign::portable::function(__VA_ARGS__)
#endif
