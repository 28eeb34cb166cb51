// The LM head's product and the sums over its results in one pass, on a CPU with AMX. The logits never leave the
// core: while the tile unit multiplies one block of them, the vector units sum the block before.
//
// A block is the logits of 32 rows and 32 tokens, [token][row]: weights are read as they lie, and a vector holds
// 16 rows. A panel is 32 tokens. The sums are those of kernel.py, over logits in float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include <immintrin.h>
#include <omp.h>

#include "common.h"

namespace {

constexpr int64_t kSide = 16;                  // rows of a tile, and its columns of 32 bits
constexpr int64_t kBlock = 2 * kSide;          // a block is made of four tiles
constexpr int64_t kDepth = 32;                 // features of a tile in 16 bits
constexpr int64_t kTileWords = kSide * kSide;  // of 32 bits
// The hidden states that stay in a core's second cache while the weights pass.
constexpr int64_t kResidentBytes = 1 << 20;

// Tiles 0 to 3 hold logits, 4 and 5 weights, 6 and 7 hidden states.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

// gcc's macros of AMX do not tell which memory they read, and not all that they write; _tile_stored does.
inline void order_memory() { asm volatile("" ::: "memory"); }

// Configures this thread's tiles; puts back what another library had configured.
class Tiles {
   public:
    Tiles() {
        order_memory();
        _tile_storeconfig(&before_);
        _tile_loadconfig(&kConfig);
        order_memory();
    }
    ~Tiles() {
        order_memory();
        if (before_.palette) {
            _tile_loadconfig(&before_);
        } else {
            _tile_release();
        }
    }

   private:
    TileConfig before_;
};

// Returns 2 ** x = 2 ** n * 2 ** f with n = round(x). The relative error is 1e-7. NaN and +inf give NaN.
inline __m512 power_of_two(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(kPowerOfTwo[0]);
    for (int i = 1; i < 6; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPowerOfTwo[i]));
    return _mm512_scalef_ps(p, n);
}

// What a call of product_sums is given. Shifts, left_out and a thread's sums have whole blocks of rows.
struct Call {
    const std::uint32_t* hidden;
    const bfloat16* weight;
    int64_t stride, num_steps;
    float scale2;
    const float* shift;
    const std::int32_t* left_out;
    int64_t num_rows;
    float* best_values;
    int64_t* best_ids;
    int64_t num_best, first_id, num_tokens;
};

struct Range {
    int64_t first, end;
};

// Sums the logits of one block after another, as few tokens at a time as the product beside it wants.
template <bool kMoment, bool kBest>
class Sums {
   public:
    Sums(const Call& call, float* masses, float* moments)
        : call_(call), masses_(masses), moments_(moments), scale2_(_mm512_set1_ps(call.scale2)) {}

    // Begins with a block, whose logits stay where they are until end().
    void begin(const float (*logits)[kBlock], int64_t first_row, int64_t first_token, int64_t num_tokens) {
        logits_ = logits, first_row_ = first_row, first_id_ = call_.first_id + first_token;
        next_ = 0, num_tokens_ = num_tokens;
        for (int half = 0; half < 2; half++) {
            const int64_t n = first_row + half * kSide;
            shift_[half] = _mm512_loadu_ps(call_.shift + n);
            left_out_[half] = _mm512_loadu_si512(call_.left_out + n);
            mass_[half] = moment_[half] = _mm512_setzero_ps();
            if constexpr (kBest) read_bounds(half);
        }
    }

    inline __attribute__((always_inline)) void take(int64_t most_tokens) {
        for (const int64_t end = std::min(next_ + most_tokens, num_tokens_); next_ < end; next_++) {
            const __m512i id = _mm512_set1_epi32(std::int32_t(first_id_ + next_));
            for (int half = 0; half < 2; half++) {
                const __m512 logit2 = _mm512_mul_ps(_mm512_load_ps(logits_[next_] + half * kSide), scale2_);
                // Smaller ones change no sum, and denormal numbers are slow. NaN stays: it is the second operand.
                const __m512 x = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_sub_ps(logit2, shift_[half]));
                const __m512 power = power_of_two(x);
                const __mmask16 is_in = _mm512_cmpneq_epi32_mask(left_out_[half], id);
                mass_[half] = _mm512_mask_add_ps(mass_[half], is_in, mass_[half], power);
                if constexpr (kMoment) moment_[half] = _mm512_mask3_fmadd_ps(power, x, moment_[half], is_in);
                if constexpr (kBest) {
                    const auto better = _mm512_mask_cmp_ps_mask(is_in, logit2, bound_[half], _CMP_GT_OQ);
                    if (better) add(half, better, logit2);
                }
            }
        }
    }

    // Takes the rest of the block, if there is a block.
    void end() {
        if (!num_tokens_) return;
        take(num_tokens_);
        for (int half = 0; half < 2; half++) {
            const int64_t n = first_row_ + half * kSide;
            _mm512_storeu_ps(masses_ + n, _mm512_add_ps(_mm512_loadu_ps(masses_ + n), mass_[half]));
            if constexpr (kMoment)
                _mm512_storeu_ps(moments_ + n, _mm512_add_ps(_mm512_loadu_ps(moments_ + n), moment_[half]));
        }
    }

   private:
    // Reads the worst of the best logits of each row. Rows that are not there have no better one.
    void read_bounds(int half) {
        alignas(64) float bounds[kSide];
        for (int64_t i = 0; i < kSide; i++) {
            const int64_t n = first_row_ + half * kSide + i;
            bounds[i] = n < call_.num_rows ? call_.best_values[n * call_.num_best] : INFINITY;
        }
        bound_[half] = _mm512_load_ps(bounds);
    }

    __attribute__((noinline)) void add(int half, unsigned better, __m512 logit2) {
        alignas(64) float values[kSide];
        _mm512_store_ps(values, logit2);
        for (; better; better &= better - 1) {
            const int i = __builtin_ctz(better);
            const int64_t place = (first_row_ + half * kSide + i) * call_.num_best;
            Best best{call_.best_values + place, call_.best_ids + place, call_.num_best};
            best.replace_worst(values[i], first_id_ + next_);
        }
        read_bounds(half);
    }

    const Call& call_;
    float *const masses_, *const moments_;
    const __m512 scale2_;
    const float (*logits_)[kBlock] = nullptr;
    int64_t first_row_ = 0, first_id_ = 0, next_ = 0, num_tokens_ = 0;
    __m512 shift_[2] = {}, mass_[2] = {}, moment_[2] = {}, bound_[2] = {};
    __m512i left_out_[2] = {};
};

// The weights of a panel, in rows that are `bytes` apart.
struct Panel {
    const char* weight;
    int64_t bytes;
};

// Returns a panel of the weights. If tokens are missing, it is a copy, where they have zeros.
Panel panel_of(const Call& call, int64_t panel, int64_t num_tokens, std::vector<bfloat16>& copy) {
    const bfloat16* weight = call.weight + panel * kBlock * call.stride;
    const int64_t width = call.num_steps * kDepth;
    if (num_tokens == kBlock) return {reinterpret_cast<const char*>(weight), call.stride * int64_t(sizeof(bfloat16))};
    copy.assign(kBlock * width, 0);
    for (int64_t v = 0; v < num_tokens; v++) std::copy_n(weight + v * call.stride, width, copy.data() + v * width);
    order_memory();
    return {reinterpret_cast<const char*>(copy.data()), width * int64_t(sizeof(bfloat16))};
}

// Multiplies blocks of rows with panels of tokens, and adds to this thread's sums.
template <bool kMoment, bool kBest>
void walk(const Call& call, Range blocks, Range panels, float* masses, float* moments) {
    const Tiles tiles;
    alignas(64) float logits[kBlock][kBlock];
    std::vector<bfloat16> copy;
    Sums<kMoment, kBest> sums(call, masses, moments);
    const int64_t steps = call.num_steps, tokens_per_step = (kBlock + steps - 1) / steps;
    const int64_t resident = std::max<int64_t>(1, kResidentBytes / (2 * 4 * kTileWords * steps));
    for (int64_t low = blocks.first; low < blocks.end; low += resident) {
        const int64_t high = std::min(low + resident, blocks.end);
        for (int64_t panel = panels.first; panel < panels.end; panel++) {
            const int64_t num_tokens = std::min(kBlock, call.num_tokens - panel * kBlock);
            const auto [upper, bytes] = panel_of(call, panel, num_tokens, copy);
            const char* lower = upper + kSide * bytes;
            for (int64_t block = low; block < high; block++) {
                const std::uint32_t* left = call.hidden + block * 2 * steps * kTileWords;
                const std::uint32_t* right = left + steps * kTileWords;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t k = 0; k < steps; k++) {
                    // Hidden states go past the first cache, which keeps the weights.
                    _tile_loadd(4, upper + k * kDepth * 2, bytes);
                    _tile_stream_loadd(6, left + k * kTileWords, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_stream_loadd(7, right + k * kTileWords, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, lower + k * kDepth * 2, bytes);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                    sums.take(tokens_per_step);
                }
                sums.end();
                _tile_stored(0, &logits[0][0], sizeof logits[0]);
                _tile_stored(1, &logits[0][kSide], sizeof logits[0]);
                _tile_stored(2, &logits[kSide][0], sizeof logits[0]);
                _tile_stored(3, &logits[kSide][kSide], sizeof logits[0]);
                sums.begin(logits, block * kBlock, panel * kBlock, num_tokens);
            }
        }
    }
    sums.end();
}

}  // namespace

// Writes the sums of each row over the tokens first_id, first_id + 1, ...: of 2 ** x into masses, of x * 2 ** x into
// moments, if it is not null, where x = scale2 * logit - shift. They leave out a row's token left_out.
//
// hidden: bfloat16 of [blocks * 2, H / 32, 16 pairs of features, 16 rows, 2]; the last rows may be zeros. weight: rows of
// H bfloat16, `stride` apart. H is a multiple of 32. shift, left_out, masses, moments: [num_rows]. best_values, best_ids:
// [num_rows, num_best], or num_best = 0; they get the best tokens, with scale2 * logit.
extern "C" void product_sums(const std::uint32_t* hidden, const bfloat16* weight, int64_t stride, int64_t hidden_size,
                             float scale2, const int64_t* left_out, const float* shift, float* masses, float* moments,
                             int64_t num_rows, float* best_values, int64_t* best_ids, int64_t num_best, int64_t first_id,
                             int64_t num_tokens) {
    const int64_t num_blocks = (num_rows + kBlock - 1) / kBlock, num_panels = (num_tokens + kBlock - 1) / kBlock;
    const int64_t padded = num_blocks * kBlock;
    std::vector<float> shifts(padded);
    std::vector<std::int32_t> left_outs(padded, -1);
    std::copy_n(shift, num_rows, shifts.begin());
    std::copy_n(left_out, num_rows, left_outs.begin());
    const Call call{hidden,   weight,      stride,   hidden_size / kDepth, scale2,   shifts.data(), left_outs.data(),
                    num_rows, best_values, best_ids, num_best,             first_id, num_tokens};
    const auto run = moments ? (num_best ? walk<true, true> : walk<true, false>)
                             : (num_best ? walk<false, true> : walk<false, false>);
    // The sums of each thread: masses of all rows, then moments. Each thread clears its own.
    const int64_t own_size = moments ? 2 * padded : padded;
    const std::unique_ptr<float[]> own_sums(new float[omp_get_max_threads() * own_size]);
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), num_threads = omp_get_num_threads();
        const auto part = [&](int64_t number) {
            return Range{number * thread / num_threads, number * (thread + 1) / num_threads};
        };
        float* own = own_sums.get() + thread * own_size;
        std::fill_n(own, own_size, 0.0f);
        // Each weight is read by one thread; but the best tokens of a row belong to one thread.
        run(call, num_best ? part(num_blocks) : Range{0, num_blocks}, num_best ? Range{0, num_panels} : part(num_panels),
            own, own + padded);
#pragma omp barrier
        const Range rows = part(num_rows);
        const auto add_up = [&](const float* first, float* sums) {
            std::fill(sums + rows.first, sums + rows.end, 0.0f);
            for (int64_t i = 0; i < num_threads; i++)
                for (int64_t n = rows.first; n < rows.end; n++) sums[n] += first[i * own_size + n];
        };
        add_up(own_sums.get(), masses);
        if (moments) add_up(own_sums.get() + padded, moments);
    }
}
