// Exact attention in bfloat16 or float16 (-DHALF) for Hopper cards (sm_90a): softmax(Q K^T) V.
//
// Tiles are copied by the tensor memory accelerator from B L N 128 as it lies; tokens past the end come as zeros.
// Scores and sums are float32, probabilities are rounded to 16 bits for their product with the values, as in every
// fast kernel. A row's base, which scores are taken relative to, is the largest score of its first tile. Where no score
// can be much above it, since none exceeds the product of the norms of its query and of the longest key, it stays there
// and nobody looks for larger ones: float32 and bfloat16 are as exact far from 1 as near it. Elsewhere the base follows
// the largest score when that is more than 2^8 above it: most tiles then need no correction of earlier sums
// (FlashAttention-4 does so on Blackwell).

#include "hopper.cuh"

#ifndef KEYS
#define KEYS 128  // of a tile; 176 is faster where no list of tiles is given
#endif
constexpr int HALF_QUERY_BYTES = TILE * 128, HALF_KEY_BYTES = KEYS * 128;  // 64 channels of a tile
constexpr int QUERY_BYTES = 2 * HALF_QUERY_BYTES, KEY_BYTES = 2 * HALF_KEY_BYTES;
constexpr int STAGES = KEYS > 128 ? 2 : 3;
constexpr int SCORES = KEYS / 2;  // of a thread
constexpr float SLACK = 8;  // powers of two

// How far above the base of a row scores may be, in powers of two, for all to stay numbers: P, in float16 up to 2^16, and
// in float32 the sums of P and of its products with values.
#ifdef HALF
#define KIND "f16"
constexpr float ROOM = 15;
#else
#define KIND "bf16"
constexpr float ROOM = 80;
#endif

// Tells the compiler that tensor cores may have changed these registers.
__device__ __forceinline__ void keep(float (&x)[64]) { asm volatile("" : IN_USE64(FLOAT_IO, x)::"memory"); }
__device__ __forceinline__ void keep(float (&x)[88]) {
    asm volatile("" : IN_USE64(FLOAT_IO, x), IN_USE8(FLOAT_IO, x, 64), IN_USE8(FLOAT_IO, x, 72), IN_USE8(FLOAT_IO, x, 80)::"memory");
}

__device__ __forceinline__ void copy_half_tile(u32 to, const void* map, int channel, int head, int token, int entry,
                                               u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::
            "r"(to),
        "l"(map), "r"(channel), "r"(head), "r"(token), "r"(entry), "r"(barrier)
        : "memory");
}

// Values: rows are tokens, of which the product runs over 16, and columns lie in two halves of 64.
__device__ __forceinline__ u64 transposed_descriptor(u32 address) {
    return ((u64)1 << 62) | ((u64)(1024 >> 4) << 32) | ((u64)(HALF_KEY_BYTES >> 4) << 16) | ((address & 0x3FFFF) >> 4);
}

// scores (+)= Q K^T for 16 channels: 64 x KEYS, both from shared memory.
__device__ __forceinline__ void multiply_scores(float (&s)[64], u64 q, u64 k, int accumulate) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND "." KIND " " SIXTY_FOUR
                 "}, %64, %65, more, 1, 1, 0, 0;\n}\n"
                 : IN_USE64(FLOAT_IO, s)
                 : "l"(q), "l"(k), "r"(accumulate));
}

__device__ __forceinline__ void multiply_scores(float (&s)[88], u64 q, u64 k, int accumulate) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %90, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n176k16.f32." KIND "." KIND " " SIXTY_FOUR
                 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83,"
                 " %84, %85, %86, %87}, %88, %89, more, 1, 1, 0, 0;\n}\n"
                 : IN_USE64(FLOAT_IO, s), IN_USE8(FLOAT_IO, s, 64), IN_USE8(FLOAT_IO, s, 72), IN_USE8(FLOAT_IO, s, 80)
                 : "l"(q), "l"(k), "r"(accumulate));
}

// sums += P V for 16 keys: 64 x 128, P from registers.
__device__ __forceinline__ void multiply_values(float (&sums)[64], const u32* p, u64 v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND "." KIND " " SIXTY_FOUR
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : IN_USE64(FLOAT_IO, sums)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// The sum of the squares of two numbers of 16 bits.
__device__ __forceinline__ float squares(u32 two) {
    float a, b;
#ifdef HALF
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(a), "=f"(b)
        : "r"(two));
#else
    a = __uint_as_float(two << 16), b = __uint_as_float(two & 0xffff0000u);
#endif
    return a * a + b * b;
}

// The norm of a query, of which four threads read a quarter each, in whatever order.
__device__ __forceinline__ float norm_of_row(u32 row_at, int lane) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            sum += squares(load_shared(row_at + half * HALF_QUERY_BYTES + lane % 4 * 32 + 4 * i));
    return sqrtf(sum_of_four_threads(sum));
}

// What one thread knows of its two rows.
struct Rows {
    float base[2];   // score that makes a P of 1, in powers of two
    float total[2];  // this thread's part of the sum of P
    float decay[2];  // what earlier sums are to be multiplied by
};

// Let the bases follow the scores of a tile. True if earlier sums must be multiplied by `decay`.
__device__ __forceinline__ bool follow(const float (&s)[SCORES], Rows& rows, float scale) {
    float most[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float a = s[2 * row], b = s[2 * row + 1];
#pragma unroll
        for (int i = 1; i < SCORES / 4; i++) a = fmaxf(a, s[4 * i + 2 * row]), b = fmaxf(b, s[4 * i + 2 * row + 1]);
        most[row] = largest_of_four_threads(fmaxf(a, b)) * scale;
    }
    const bool is_raised =
        __any_sync(0xffffffffu, most[0] > rows.base[0] + SLACK || most[1] > rows.base[1] + SLACK);
    if (is_raised) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const float base = fmaxf(rows.base[row], most[row]);
            rows.decay[row] = power_of_two(rows.base[row] - base);
            rows.total[row] *= rows.decay[row];
            rows.base[row] = base;
        }
    }
    return is_raised;
}

// Scores become P, unrounded and in place.
__device__ __forceinline__ void soften(float (&s)[SCORES], Rows& rows, float scale) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float a = 0, b = 0;
#pragma unroll
        for (int i = 0; i < SCORES / 4; i++) {
            a += s[4 * i + 2 * row] = power_of_two(fmaf(s[4 * i + 2 * row], scale, -rows.base[row]));
            b += s[4 * i + 2 * row + 1] = power_of_two(fmaf(s[4 * i + 2 * row + 1], scale, -rows.base[row]));
        }
        rows.total[row] += a + b;
    }
}

__device__ __forceinline__ void pack_all(const float (&s)[SCORES], u32 (&p)[SCORES / 2]) {
#pragma unroll
    for (int i = 0; i < SCORES / 2; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// Keys from `count` on are none.
__device__ __forceinline__ void hide_keys(float (&s)[SCORES], int count, int lane) {
#pragma unroll
    for (int i = 0; i < SCORES; i++)
        if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= count) s[i] = __int_as_float(NO_KEY);
}

struct alignas(64) TensorMap {
    u64 opaque[16];
};

// q, k, v: maps of B L N 128. key_norms: of the longest key of every head, batch * heads. scale: turns products into
// powers of two.
// listed: (batch * heads) x query tiles x key tiles, of which the first `counts` are read; null for all of them. The
// last tile of all, which may be partly filled, comes last.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend16(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
             const float* __restrict__ key_norms, u16* __restrict__ out, const int* __restrict__ listed,
             const int* __restrict__ counts, float scale, int queries, int keys, int heads_of_batch, long long batch_stride,
             long long token_stride, long long head_stride) {
    extern __shared__ u8 raw[];
    const u32 base = (shared_address(raw) + 1023) & ~1023u;
    const u32 k_tiles_at = base, v_tiles_at = base + STAGES * KEY_BYTES, q_at = v_tiles_at + STAGES * KEY_BYTES;
    const u32 q_full = q_at + QUERY_BYTES, k_full = q_full + 8, v_full = k_full + 8 * STAGES,
              k_free = v_full + 8 * STAGES, v_free = k_free + 8 * STAGES;

    const int key_tiles = (keys + KEYS - 1) / KEYS, tile = blockIdx.x, all_heads = blockIdx.y;
    const int head = all_heads % heads_of_batch, entry = all_heads / heads_of_batch;
    const size_t row_of_lists = (size_t)all_heads * gridDim.x + tile;
    const int* list = listed ? listed + row_of_lists * key_tiles : nullptr;
    const int count = listed ? counts[row_of_lists] : key_tiles;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(k_full + 8 * i, 1);
            barrier_init(v_full + 8 * i, 1);
            barrier_init(k_free + 8 * i, 8);  // one arrival of each consumer warp
            barrier_init(v_free + 8 * i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (group == 0) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread == 0) {
            auto copy = [&](u32 to, const TensorMap& map, int token, u32 half_bytes, u32 barrier) {
                barrier_expect(barrier, 2 * half_bytes);
                copy_half_tile(to, &map, 0, head, token, entry, barrier);
                copy_half_tile(to + half_bytes, &map, 64, head, token, entry, barrier);
            };
            copy(q_at, q, tile * TILE, HALF_QUERY_BYTES, q_full);
            for (int i = 0, stage = 0, turn = 1; i < count; i++) {
                const int token = (list ? list[i] : i) * KEYS;
                barrier_wait(k_free + 8 * stage, turn);
                copy(k_tiles_at + stage * KEY_BYTES, k, token, HALF_KEY_BYTES, k_full + 8 * stage);
                barrier_wait(v_free + 8 * stage, turn);
                copy(v_tiles_at + stage * KEY_BYTES, v, token, HALF_KEY_BYTES, v_full + 8 * stage);
                if (++stage == STAGES) stage = 0, turn ^= 1;
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int consumer = group - 1, lane = thread % 32;
    const int row_in_tile = 64 * consumer + 16 * (thread / 32) + lane / 4, first_row = tile * TILE + row_in_tile;
    const u64 q_matrix = matrix_descriptor(q_at + consumer * (HALF_QUERY_BYTES / 2));
    Rows rows = {{__int_as_float(NO_KEY), __int_as_float(NO_KEY)}, {0, 0}, {0, 0}};
    float sums[64], s[SCORES];
    u32 p[SCORES / 2];
    const int hidden_from = keys - (list ? list[count - 1] : count - 1) * KEYS;  // in the last tile

    auto scores = [&](int stage) {  // issues the products with the keys of a stage
        const u64 k_matrix = matrix_descriptor(k_tiles_at + stage * KEY_BYTES);
        products_begin();
#pragma unroll
        for (int step = 0; step < 8; step++) {
            const int half = step / 4, within = step % 4 * 2;
            multiply_scores(s, q_matrix + half * (HALF_QUERY_BYTES >> 4) + within,
                            k_matrix + half * (HALF_KEY_BYTES >> 4) + within, step);
        }
        products_commit();
    };
    auto values = [&](int stage) {
        const u64 v_matrix = transposed_descriptor(v_tiles_at + stage * KEY_BYTES);
        products_begin();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) multiply_values(sums, p + 4 * step, v_matrix + step * (16 * 128 >> 4));
        products_commit();
    };

#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] = 0;
    barrier_wait(q_full, 0);
    barrier_wait(k_full, 0);
    scores(0);
    float most[2];  // that a score can be
#pragma unroll
    for (int row = 0; row < 2; row++)
        most[row] = norm_of_row(q_at + (row_in_tile + 8 * row) * 128, lane) * key_norms[all_heads] * scale;
    products_wait<0>();
    keep(s);
    if (lane == 0) barrier_arrive(k_free);
    if (count == 1 && hidden_from < KEYS) hide_keys(s, hidden_from, lane);
    follow(s, rows, scale);
    soften(s, rows, scale);
    pack_all(s, p);
    const bool is_bounded =
        __all_sync(0xffffffffu, most[0] - rows.base[0] <= ROOM && most[1] - rows.base[1] <= ROOM);  // not with NaN

    // Named barriers 1 and 2: whose turn it is in the tensor cores. The first consumer begins.
    if (consumer == 1) asm volatile("bar.arrive 1, 256;" ::: "memory");
    int stage = 0, turn = 0;
    for (int i = 0; i + 1 < count; i++) {
        const int next_stage = stage + 1 == STAGES ? 0 : stage + 1, next_turn = next_stage ? turn : turn ^ 1;
        barrier_wait(k_full + 8 * next_stage, next_turn);
        asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
        scores(next_stage);
        barrier_wait(v_full + 8 * stage, turn);
        values(stage);
        asm volatile("bar.arrive %0, 256;" ::"r"(2 - consumer) : "memory");
        products_wait<1>();
        keep(s);
        if (lane == 0) barrier_arrive(k_free + 8 * next_stage);
        if (i + 2 == count && hidden_from < KEYS) hide_keys(s, hidden_from, lane);
        const bool is_raised = !is_bounded && follow(s, rows, scale);
        soften(s, rows, scale);
        products_wait<0>();
        keep(sums);
        if (lane == 0) barrier_arrive(v_free + 8 * stage);
        if (is_raised) {
#pragma unroll
            for (int j = 0; j < 64; j++) sums[j] *= rows.decay[j / 2 % 2];
        }
        pack_all(s, p);
        stage = next_stage;
        turn = next_turn;
    }
    barrier_wait(v_full + 8 * stage, turn);
    values(stage);
    products_wait<0>();
    keep(sums);

    u16* own_out = out + entry * batch_stride + head * head_stride;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const float inverse = 1.0f / sum_of_four_threads(rows.total[row]);
        const int token = first_row + 8 * row;
        if (token >= queries) continue;
#pragma unroll
        for (int i = 0; i < 16; i++)
            *reinterpret_cast<u32*>(own_out + token * token_stride + 8 * i + 2 * (lane % 4)) =
                pack(sums[4 * i + 2 * row] * inverse, sums[4 * i + 2 * row + 1] * inverse);
    }
}
