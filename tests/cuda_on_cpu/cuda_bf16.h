#pragma once

#include <torch/headeronly/util/BFloat16.h>

using __nv_bfloat16 = torch::headeronly::BFloat16;

inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return static_cast<__nv_bfloat16>(value); }
