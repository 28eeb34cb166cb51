// Runs after the LM head's product on a CPU: one pass over a tile. It also computes the logits of single tokens.
//
// A tile in bfloat16 is shifted: it holds x, the logits in base 2 minus the row's shift (see kernel.py), because a
// rounded product has too few digits to subtract from. A tile in float holds products, and x = scale2 * product - shift.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <omp.h>

#include "common.h"

namespace {

inline float from_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline std::uint32_t to_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float widen(bfloat16 x) { return from_bits(std::uint32_t(x) << 16); }
inline float widen(float x) { return x; }

inline bfloat16 narrow(float x) { return bfloat16(to_bits(x) >> 16); }  // exact for what bfloat16 holds

// Returns 2 ** x = 2 ** n * 2 ** f with n = round(x), |f| <= 1/2: a polynomial for 2 ** f (minimax of the relative
// error), times the float with exponent n. The relative error is 3e-6 for bfloat16, a thousandth of bfloat16's own
// rounding, and 1e-7 for float. Results below 2 ** -126 are too small to change a sum. For x above 127 the result is
// at least 2 ** 127. The result for NaN and infinities is NaN.
template <typename T>
inline float power_of_two(float x) {
    const float to_integer = 12582912.0f + 127.0f;  // 1.5 * 2 ** 23: a number that is added to it loses its fraction
    const float n = x + to_integer;                 // the last bits of n are round(x) + 127, a float's exponent
    const float f = x - (n - to_integer);
    float p;
    if (sizeof(T) == 2) {
        p = 9.57009041e-3f;
        p = p * f + 5.59178594e-2f;
        p = p * f + 2.40247451e-1f;
        p = p * f + 6.93121815e-1f;
        p = p * f + 9.99999261e-1f;
    } else {
        p = kPowerOfTwo[0];
        p = p * f + kPowerOfTwo[1];
        p = p * f + kPowerOfTwo[2];
        p = p * f + kPowerOfTwo[3];
        p = p * f + kPowerOfTwo[4];
        p = p * f + kPowerOfTwo[5];
    }
    const auto exponent = std::clamp(std::int32_t(to_bits(n)), std::int32_t(to_bits(to_integer - 126.0f)),
                                     std::int32_t(to_bits(to_integer + 127.0f)));
    return p * from_bits(std::uint32_t(exponent) << 23);
}

// The sums of a row: of 2 ** x, and of x * 2 ** x.
struct Sums {
    float mass, moment;
};

// A row of a shifted tile.
struct ShiftedRow {
    bfloat16* row;
    float shift;

    float logit2(int64_t i) const { return widen(row[i]) + shift; }

    // Returns the sums, and fills the row with -shift for the next product. Without kMoment the moment is 0.
    template <bool kMoment>
    Sums sum(int64_t num_columns) const {
        const bfloat16 narrow_fill = narrow(-shift);
        float low = 0.0f, high = 0.0f, low_moment = 0.0f, high_moment = 0.0f;
        const auto take_one = [&](int64_t i) {
            const float x = widen(row[i]), power = power_of_two<bfloat16>(x);
            low += power;
            if constexpr (kMoment) low_moment += power * x;
            row[i] = narrow_fill;
        };
        // Two numbers in a word are cheaper to widen.
        const int64_t start = reinterpret_cast<std::uintptr_t>(row) % 4 != 0, num_pairs = (num_columns - start) / 2;
        if (start) take_one(0);
        if (start + 2 * num_pairs < num_columns) take_one(num_columns - 1);
        auto* pairs = reinterpret_cast<std::uint32_t*>(row + start);
        const std::uint32_t fill_pair = narrow_fill * 0x10001u;
#pragma omp simd reduction(+ : low, high, low_moment, high_moment)
        for (int64_t i = 0; i < num_pairs; i++) {
            const std::uint32_t pair = pairs[i];
            const float x = from_bits(pair << 16), y = from_bits(pair & 0xffff0000u);
            const float power_x = power_of_two<bfloat16>(x), power_y = power_of_two<bfloat16>(y);
            low += power_x;
            high += power_y;
            if constexpr (kMoment) {
                low_moment += power_x * x;
                high_moment += power_y * y;
            }
            pairs[i] = fill_pair;
        }
        return {low + high, low_moment + high_moment};
    }
};

// A row of products. The token of a product that is -inf is left out.
struct ProductRow {
    const float* row;
    float scale2, shift;

    float logit2(int64_t i) const { return scale2 * row[i]; }

    // Returns the sums. Without kMoment the moment is 0. Sums of short stretches are added up: a sum of many equal
    // numbers would be rounded in one direction at each of them.
    template <bool kMoment>
    Sums sum(int64_t num_columns) const {
        constexpr int64_t kStretch = 512;
        const float *const products = row, scale = scale2, base = shift;
        float mass = 0.0f, moment = 0.0f;
        for (int64_t low = 0; low < num_columns; low += kStretch) {
            const int64_t high = std::min(low + kStretch, num_columns);
            float mass_here = 0.0f, moment_here = 0.0f;
#pragma omp simd reduction(+ : mass_here, moment_here)
            for (int64_t i = low; i < high; i++) {
                const float own = scale * products[i] - base;
                const float x = own < -127.0f ? -127.0f : own;  // smaller ones change no sum; NaN stays
                const float power = power_of_two<float>(x);
                mass_here += power;
                if constexpr (kMoment) moment_here += power * x;
            }
            mass += mass_here;
            moment += moment_here;
        }
        return {mass, moment};
    }
};

// Adds the tokens of a row.
template <typename Row>
void add(Best best, const Row& row, int64_t num_columns, int64_t first_id) {
    constexpr int64_t kBlock = 128;
    for (int64_t low = 0; low < num_columns; low += kBlock) {
        const int64_t high = std::min(low + kBlock, num_columns);
        const float bound = best.values[0];
        float top = bound;
#pragma omp simd reduction(max : top)
        for (int64_t i = low; i < high; i++) {
            const float value = row.logit2(i);
            top = value > top ? value : top;
        }
        if (!(top > bound)) continue;
        for (int64_t i = low; i < high; i++) {
            const float value = row.logit2(i);
            if (value > best.values[0]) best.replace_worst(value, first_id + i);
        }
    }
}

// Each thread goes from its last row to its first: the product has left the last rows in the core's cache.
template <bool kMoment, typename RowAt>
void pass(RowAt row_at, int64_t num_rows, int64_t num_columns, float* masses, float* moments, float* best_values,
          int64_t* best_ids, int64_t num_best, int64_t first_id) {
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        const int64_t first = num_rows * thread / num_threads, end = num_rows * (thread + 1) / num_threads;
        for (int64_t n = end - 1; n >= first; n--) {
            const auto row = row_at(n);
            if (num_best) {
                add({best_values + n * num_best, best_ids + n * num_best, num_best}, row, num_columns, first_id);
            }
            const Sums sums = row.template sum<kMoment>(num_columns);
            masses[n] = sums.mass;
            if constexpr (kMoment) moments[n] = sums.moment;
        }
    }
}

template <typename T>
void token_logits(const T* hidden, const T* weight, const int64_t* ids, double* logits, int64_t num_rows, int64_t num_ids,
                  int64_t hidden_size) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < num_rows; n++) {
        for (int64_t k = 0; k < num_ids; k++) {
            const T *a = hidden + n * hidden_size, *b = weight + ids[n * num_ids + k] * hidden_size;
            double sum = 0.0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < hidden_size; i++) sum += double(widen(a[i])) * double(widen(b[i]));
            logits[n * num_ids + k] = sum;
        }
    }
}

}  // namespace

// tile: num_rows rows of num_columns, `stride` apart. shift, masses, moments: [num_rows]; moments may be null.
// best_values, best_ids: [num_rows, num_best], or num_best = 0.
extern "C" void sum_products(const float* tile, int64_t stride, int64_t num_rows, int64_t num_columns, float scale2,
                             const float* shift, float* masses, float* moments, float* best_values, int64_t* best_ids,
                             int64_t num_best, int64_t first_id) {
    const auto row_at = [=](int64_t n) { return ProductRow{tile + n * stride, scale2, shift[n]}; };
    const auto run = moments ? pass<true, decltype(row_at)> : pass<false, decltype(row_at)>;
    run(row_at, num_rows, num_columns, masses, moments, best_values, best_ids, num_best, first_id);
}

extern "C" void sum_shifted(bfloat16* tile, int64_t stride, int64_t num_rows, int64_t num_columns, const float* shift,
                            float* masses, float* moments, float* best_values, int64_t* best_ids, int64_t num_best,
                            int64_t first_id) {
    const auto row_at = [=](int64_t n) { return ShiftedRow{tile + n * stride, shift[n]}; };
    const auto run = moments ? pass<true, decltype(row_at)> : pass<false, decltype(row_at)>;
    run(row_at, num_rows, num_columns, masses, moments, best_values, best_ids, num_best, first_id);
}

// hidden: [num_rows, hidden_size]; weight: [V, hidden_size]; ids, logits: [num_rows, num_ids]. The sums are doubles.
#define TOKEN_LOGITS(NAME, T)                                                                                            \
    extern "C" void NAME(const T* hidden, const T* weight, const int64_t* ids, double* logits, int64_t num_rows,         \
                         int64_t num_ids, int64_t hidden_size) {                                                         \
        token_logits(hidden, weight, ids, logits, num_rows, num_ids, hidden_size);                                       \
    }
TOKEN_LOGITS(token_logits_bfloat16, bfloat16)
TOKEN_LOGITS(token_logits_float32, float)
