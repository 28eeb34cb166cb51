// What kernel.cpp and amx.cpp have in common.

#pragma once

#include <cstdint>

namespace {

using std::int64_t;
using bfloat16 = std::uint16_t;  // the upper half of a float

// 2 ** f for |f| <= 1/2: a polynomial in f, minimax of the relative error, which is 1e-7. Highest power first.
constexpr float kPowerOfTwo[] = {1.32764741e-3f, 9.67553803e-3f, 5.55071329e-2f,
                                 2.40221202e-1f, 6.93146970e-1f, 1.00000007f};

// The best tokens of a row so far, in a heap. Its root, entry 0, is the worst of them.
struct Best {
    float* values;
    int64_t* ids;
    int64_t size;

    void replace_worst(float value, int64_t id) {
        int64_t place = 0;
        for (int64_t child = 1; child < size; child = 2 * place + 1) {
            if (child + 1 < size && values[child + 1] < values[child]) child++;
            if (values[child] >= value) break;
            values[place] = values[child];
            ids[place] = ids[child];
            place = child;
        }
        values[place] = value;
        ids[place] = id;
    }
};

}  // namespace
