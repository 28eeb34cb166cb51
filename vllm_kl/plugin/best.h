// The best tokens of one row, for the loops of this folder.

#pragma once

#include <cstdint>

namespace {

using std::int64_t;

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
