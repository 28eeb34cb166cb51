// Sums of 2 ** x over the rows of a bfloat16 tile, which is then filled for the product that comes next: one pass.
//
// 2 ** x = 2 ** n * 2 ** f with n = round(x), |f| <= 1/2: a polynomial for 2 ** f, times the float whose exponent is n. The
// relative error is 3e-6 at most, a thousandth of bfloat16's own, and zero on average. Below 2 ** -126 nothing is lost that a
// sum could hold; what is above 2 ** 127 makes the sum at least that large. NaN and infinities make it NaN.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <omp.h>


namespace {

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline int32_t as_bits(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline void add_power_of_two(float& sum, float x) {
    const float to_integer = 12582912.0f + 127.0f;  // 1.5 * 2 ** 23: what is added to it loses its fraction
    const float n = x + to_integer;                 // its last bits are round(x) + 127, a float's exponent
    const float f = x - (n - to_integer);
    float p = 9.57009041e-3f;  // relative minimax on [-1/2, 1/2]
    p = p * f + 5.59178594e-2f;
    p = p * f + 2.40247451e-1f;
    p = p * f + 6.93121815e-1f;
    p = p * f + 9.99999261e-1f;
    const int32_t exponent = std::clamp(as_bits(n), as_bits(to_integer - 126.0f), as_bits(to_integer + 127.0f));
    sum += p * as_float(static_cast<uint32_t>(exponent) << 23);
}

}  // namespace

// tile: [num_rows, 2 * num_pairs] bfloat16, two to a word; fill: [num_rows] bfloat16; sums: [num_rows].
//
// Each thread takes its rows from the last to the first: the last are what the product has left in the core's cache.
extern "C" void exp2_sums(uint32_t* tile, const uint16_t* fill, float* sums, int64_t num_rows, int64_t num_pairs) {
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        const int64_t first = num_rows * thread / num_threads, end = num_rows * (thread + 1) / num_threads;
        for (int64_t row = end - 1; row >= first; row--) {
            uint32_t* pairs = tile + row * num_pairs;
            const uint32_t fill_pair = fill[row] * 0x10001u;
            float low = 0.0f, high = 0.0f;
#pragma omp simd reduction(+ : low, high)
            for (int64_t i = 0; i < num_pairs; i++) {
                const uint32_t pair = pairs[i];
                add_power_of_two(low, as_float(pair << 16));
                add_power_of_two(high, as_float(pair & 0xffff0000u));
                pairs[i] = fill_pair;
            }
            sums[row] = low + high;
        }
    }
}
