// Sums, products and quotients of sizes, which are never negative: 64 bits hold them, or the operation is refused.

#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define COMPLORA_HOST_DEVICE __host__ __device__
#else
#define COMPLORA_HOST_DEVICE
#endif

namespace complora {

template <typename... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  return text.str();
}

// A macro, so that a sentence is only written where something is wrong.
#define COMPLORA_CHECK(condition, ...)                             \
  do {                                                             \
    if (!(condition)) {                                            \
      throw std::runtime_error(::complora::sentence(__VA_ARGS__)); \
    }                                                              \
  } while (false)

constexpr int64_t MAX_SIZE = std::numeric_limits<int64_t>::max();

inline int64_t sum_of(int64_t a, int64_t b) {
  COMPLORA_CHECK(a <= MAX_SIZE - b, "a size is ", a, " + ", b, ", expected less than 2^63");
  return a + b;
}

inline int64_t product_of(int64_t a, int64_t b) {
  COMPLORA_CHECK(b == 0 || a <= MAX_SIZE / b, "a size is ", a, " * ", b, ", expected less than 2^63");
  return a * b;
}

COMPLORA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace complora
