// Attention in 8 bits for Hopper cards (sm_90a): softmax(Q K^T) V with int8 Q and K, and e4m3 P and V.
//
// One block of threads makes 128 rows of one head: one producer warpgroup copies tiles of 128 keys and values into
// shared memory, two consumer warpgroups of 64 rows each take turns, one in the tensor cores while the other is in its
// softmax. Queries, keys and values come as tiles that already lie as the tensor cores read them (see tiles.py), so
// that a tile is one bulk copy.
//
// Numbers: a score is an exact int32; adding it to the bits of 1.5 * 2^23 makes it a float32 without a conversion. P is
// relative to a base that a row keeps until P leaves e4m3, which shows when P is rounded: in float32 it is still there,
// and follows the new base. Where a score could be so far above the base that float32 would not hold it either, going by
// the norms of its query and of the longest key, scores are looked through for that first.
// Products of P and V are summed over a few tiles in the tensor cores and beyond in float32 registers, because the tensor
// cores keep only some 14 bits of a sum of 8-bit products.
//
// Techniques: FlashAttention-3 (arXiv 2407.08608), SageAttention 2 (arXiv 2411.10958). Written from the papers.

#include "hopper.cuh"

constexpr int TILE_BYTES = TILE * TILE;  // of 8-bit values
constexpr int KEY_TILE_BYTES = TILE_BYTES + 16;  // and its scale
constexpr int STAGE_BYTES = TILE_BYTES + 1024;   // a tile, and behind it 8 rows: the scale of keys, or ones
constexpr int STAGES = 4;                        // tiles of keys and of values in flight
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
constexpr int MAGIC_BITS = 0x4B400000;
// log2 of the largest P when a row's base is set. e4m3 ends at 2^8.8: scores may rise by a factor of 28 before the base
// has to follow, which costs as much as a tile, and it is exact to 2^-6 and holds something down to 2^-9.
constexpr float USUAL_P = 4.0f;
constexpr float LARGEST_P = 8.8f;
constexpr float ROOM = 120.0f;     // powers of two that scores may rise above a base with P still in float32
constexpr int FLUSH = 4;           // tiles that the tensor cores sum up by themselves

// Tells the compiler that tensor cores may have changed these registers.
__device__ __forceinline__ void keep(int (&x)[64]) { asm volatile("" : IN_USE64(INT_IO, x)::"memory"); }
__device__ __forceinline__ void keep(float (&x)[68]) {
    asm volatile("" : IN_USE64(FLOAT_IO, x), "+f"(x[64]), "+f"(x[65]), "+f"(x[66]), "+f"(x[67])::"memory");
}

// scores += Q K^T for 32 channels: 64 x 128, both from shared memory.
__device__ __forceinline__ void multiply_scores(int (&s)[64], u64 q, u64 k) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " SIXTY_FOUR "}, %64, %65, 1;"
                 : IN_USE64(INT_IO, s)
                 : "l"(q), "l"(k));
}

// part (+)= P V for 32 keys: 64 x 136, P from registers; the last 8 columns are ones and give P's sum.
__device__ __forceinline__ void multiply_values(float (&t)[68], const u32* p, u64 v, int accumulate) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %73, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 " SIXTY_FOUR
                 ", %64, %65, %66, %67}, {%68, %69, %70, %71}, %72, more, 1, 1;\n}\n"
                 : IN_USE64(FLOAT_IO, t), "+f"(t[64]), "+f"(t[65]), "+f"(t[66]), "+f"(t[67])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(accumulate));
}

// Four floats as e4m3, the first in the lowest byte.
__device__ __forceinline__ u32 pack(float a, float b, float c, float d) {
    u32 out;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}\n"
        : "=r"(out)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return out;
}

// The norm of a query, of which four threads read a quarter each, in whatever order.
__device__ __forceinline__ float norm_of_row(u32 row_at, int lane) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int four = load_shared(row_at + lane % 4 * 32 + 4 * i);
        sum = __dp4a(four, four, sum);
    }
    return sqrtf(sum_of_four_threads(sum));
}

// What one thread knows of its two rows.
struct Rows {
    float base[2];   // score, in powers of two, that makes a P of 2^USUAL_P
    float scale[2];  // of the queries
};

// Scores become P in float32, in place.
__device__ __forceinline__ void soften(int (&s)[64], const Rows& rows, float key_scale) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const float scale = rows.scale[row] * key_scale, shift = USUAL_P - rows.base[row] - MAGIC * scale;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int& x = s[i / 2 * 4 + 2 * row + i % 2];
            x = __float_as_int(power_of_two(fmaf(__int_as_float(x), scale, shift)));
        }
    }
}

// P as the tensor cores take it: 4 registers for each 32 keys, in the order of the values. True if one is too large for
// e4m3.
__device__ __forceinline__ bool pack_all(const int (&s)[64], u32 (&p)[16]) {
    u32 large = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int first = 16 * i + 8 * (j / 2) + 2 * (j % 2);  // rows g, g + 8 of keys 0..15, then of keys 16..31
            p[4 * i + j] = pack(__int_as_float(s[first]), __int_as_float(s[first + 1]), __int_as_float(s[first + 4]),
                                __int_as_float(s[first + 5]));
            large |= p[4 * i + j] + 0x02020202;  // 448 and NaN are 0x7e and 0x7f
        }
    return large & 0x80808080;
}

// The largest of a row's scores or P in the tile.
__device__ __forceinline__ float largest_of_row(const int (&s)[64], int row) {
    float most = __int_as_float(s[2 * row]);
#pragma unroll
    for (int i = 0; i < 16; i++)
        most = fmaxf(fmaxf(most, __int_as_float(s[4 * i + 2 * row])), __int_as_float(s[4 * i + 2 * row + 1]));
    return largest_of_four_threads(most);
}

// Set each row's base to the largest score of this tile, if one of the warp's rows needs it. Returns whether that is so,
// and what earlier sums are to be multiplied by.
__device__ __forceinline__ bool follow(const int (&s)[64], Rows& rows, float key_scale, float (&decay)[2]) {
    float most[2];
#pragma unroll
    for (int row = 0; row < 2; row++)
        most[row] = (largest_of_row(s, row) - MAGIC) * (rows.scale[row] * key_scale);
    constexpr float SLACK = LARGEST_P - USUAL_P;
    if (!__any_sync(0xffffffffu, most[0] > rows.base[0] + SLACK || most[1] > rows.base[1] + SLACK)) return false;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        most[row] = fmaxf(rows.base[row], most[row]);
        decay[row] = power_of_two(rows.base[row] - most[row]);
        rows.base[row] = most[row];
    }
    return true;
}

// Raise each row's base by so many whole powers of two that the largest P of this tile is about the usual one, and
// change P accordingly.
__device__ __forceinline__ void lower(int (&s)[64], Rows& rows, float (&decay)[2]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const float rise = fmaxf(0.0f, ceilf(__log2f(largest_of_row(s, row)) - USUAL_P));
        rows.base[row] += rise;
        decay[row] = power_of_two(-rise);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int& x = s[i / 2 * 4 + 2 * row + i % 2];
            x = __float_as_int(__int_as_float(x) * decay[row]);
        }
    }
}

// Keys from `count` on are none.
__device__ __forceinline__ void hide_keys(int (&s)[64], int count, int lane) {
#pragma unroll
    for (int i = 0; i < 64; i++)
        if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= count) s[i] = NO_KEY;
}

// heads: of all batch entries together. q, k, v: heads x tiles, those of k with their scales. key_norms: of the longest
// key of every head. out: bfloat16.
// listed: heads x query tiles x key tiles, of which the first `counts` are read; null for all of them. The last tile of
// all, which may be partly filled, comes last.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend8(const u8* __restrict__ q, const float* __restrict__ q_scale, const u8* __restrict__ k,
            const float* __restrict__ key_norms, const u8* __restrict__ v, const float* __restrict__ v_scale,
            u16* __restrict__ out, const int* __restrict__ listed, const int* __restrict__ counts, int queries, int keys,
            int heads_of_batch, long long batch_stride, long long token_stride, long long head_stride) {
    extern __shared__ u8 raw[];
    const u32 base = (shared_address(raw) + 1023) & ~1023u;
    u8* const shared = raw + (base - shared_address(raw));
    constexpr u32 V_AT = STAGES * STAGE_BYTES, Q_AT = 2 * V_AT, BARRIERS_AT = Q_AT + TILE_BYTES;
    const u32 k_tiles_at = base, v_tiles_at = base + V_AT, q_at = base + Q_AT;
    // A stage of keys and the stage of values before it are filled and freed together: one round of the loop needs both.
    const u32 first_full = base + BARRIERS_AT, full = first_full + 8, free = full + 8 * STAGES;

    const int key_tiles = (keys + TILE - 1) / TILE, tile = blockIdx.x, head = blockIdx.y;
    const size_t row_of_lists = (size_t)head * gridDim.x + tile;
    const int* list = listed ? listed + row_of_lists * key_tiles : nullptr;
    const int count = listed ? counts[row_of_lists] : key_tiles;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;

    if (threadIdx.x == 0) {
        barrier_init(first_full, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(free + 8 * i, 8);  // one arrival of each consumer warp
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < STAGES * 256; i += THREADS)
        *reinterpret_cast<u32*>(shared + V_AT + i / 256 * STAGE_BYTES + TILE_BYTES + i % 256 * 4) = 0x38383838;  // ones
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    if (group == 0) {  // producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread == 0) {
            const u8* own_k = k + (size_t)head * key_tiles * KEY_TILE_BYTES;
            const u8* own_v = v + (size_t)head * key_tiles * TILE_BYTES;
            int now = list ? list[0] : 0;
            barrier_expect(first_full, TILE_BYTES + KEY_TILE_BYTES);
            copy_tile(q_at, q + row_of_lists * TILE_BYTES, TILE_BYTES, first_full);
            copy_tile(k_tiles_at, own_k + (size_t)now * KEY_TILE_BYTES, KEY_TILE_BYTES, first_full);
            for (int i = 0, stage = 0, turn = 1; i < count; i++) {  // values of tile i, keys of the next
                const int next_stage = stage + 1 == STAGES ? 0 : stage + 1;
                barrier_wait(free + 8 * stage, turn);
                if (i == STAGES - 1) barrier_wait(free, 0);  // the first keys have been read
                const bool is_last = i + 1 == count;
                barrier_expect(full + 8 * stage, TILE_BYTES + (is_last ? 0 : KEY_TILE_BYTES));
                copy_tile(v_tiles_at + stage * STAGE_BYTES, own_v + (size_t)now * TILE_BYTES, TILE_BYTES, full + 8 * stage);
                if (!is_last) {
                    now = list ? list[i + 1] : i + 1;
                    copy_tile(k_tiles_at + next_stage * STAGE_BYTES, own_k + (size_t)now * KEY_TILE_BYTES, KEY_TILE_BYTES,
                              full + 8 * stage);
                }
                stage = next_stage;
                if (!stage) turn ^= 1;
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int consumer = group - 1, lane = thread % 32;
    const int row_in_tile = 64 * consumer + 16 * (thread / 32) + lane / 4, first_row = tile * TILE + row_in_tile;
    const u64 q_matrix = matrix_descriptor(q_at + consumer * (TILE_BYTES / 2));
    Rows rows;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        rows.base[row] = __int_as_float(NO_KEY);
        rows.scale[row] = q_scale[row_of_lists * TILE + row_in_tile + 8 * row];
    }
    float sums[68], part[68];
    int s[64];
    u32 p[16];

    auto scores = [&](int stage) {  // issues the products with the keys of a stage
        const u64 k_matrix = matrix_descriptor(k_tiles_at + stage * STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < 64; i++) s[i] = MAGIC_BITS;
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; step++) multiply_scores(s, q_matrix + 2 * step, k_matrix + 2 * step);
        products_commit();
    };
    auto values = [&](int stage, int accumulate) {
        const u64 v_matrix = matrix_descriptor(v_tiles_at + stage * STAGE_BYTES);
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; step++)
            multiply_values(part, p + 4 * step, v_matrix + 2 * step, step ? 1 : accumulate);
        products_commit();
    };
    auto scale_of = [&](int stage) {
        return *reinterpret_cast<volatile float*>(shared + stage * STAGE_BYTES + TILE_BYTES);
    };
    const int hidden_from = keys - (list ? list[count - 1] : count - 1) * TILE;  // in the last tile
    float decay[2];

#pragma unroll
    for (int i = 0; i < 68; i++) sums[i] = 0;
    barrier_wait(first_full, 0);
    float key_scale = scale_of(0);
    scores(0);
    float most[2];  // that a score can be
#pragma unroll
    for (int row = 0; row < 2; row++)
        most[row] = norm_of_row(q_at + (row_in_tile + 8 * row) * TILE, lane) * rows.scale[row] * key_norms[head];
    products_wait<0>();
    keep(s);
    if (count == 1 && hidden_from < TILE) hide_keys(s, hidden_from, lane);
    follow(s, rows, key_scale, decay);
    soften(s, rows, key_scale);
    pack_all(s, p);
    const bool is_bounded =
        __all_sync(0xffffffffu, most[0] - rows.base[0] <= ROOM && most[1] - rows.base[1] <= ROOM);  // not with NaN

    // Named barriers 1 and 2: whose turn it is in the tensor cores. The first consumer begins.
    if (consumer == 1) asm volatile("bar.arrive 1, 256;" ::: "memory");
    int stage = 0, turn = 0;
    for (int i = 0; i + 1 < count; i++) {
        const int next_stage = stage + 1 == STAGES ? 0 : stage + 1;
        barrier_wait(full + 8 * stage, turn);
        asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
        scores(next_stage);
        values(stage, i % FLUSH);
        asm volatile("bar.arrive %0, 256;" ::"r"(2 - consumer) : "memory");
        key_scale = scale_of(next_stage);
        products_wait<1>();
        keep(s);
        if (i + 2 == count && hidden_from < TILE) hide_keys(s, hidden_from, lane);
        bool is_raised = !is_bounded && follow(s, rows, key_scale, decay);
        soften(s, rows, key_scale);
        products_wait<0>();
        keep(part);
        if (lane == 0) barrier_arrive(free + 8 * stage);
        const bool is_full = i % FLUSH == FLUSH - 1;
        if (is_full) {
#pragma unroll
            for (int j = 0; j < 68; j++) sums[j] += part[j];
        }
        if (__any_sync(0xffffffffu, pack_all(s, p)) && is_bounded) {
            lower(s, rows, decay);
            pack_all(s, p);
            is_raised = true;
        }
        if (is_raised) {
#pragma unroll
            for (int j = 0; j < 68; j++) {
                if (!is_full) sums[j] += part[j];
                sums[j] *= decay[j / 2 % 2];
                part[j] = 0;
            }
        }
        stage = next_stage;
        if (!stage) turn ^= 1;
    }
    barrier_wait(full + 8 * stage, turn);
    values(stage, (count - 1) % FLUSH);
    products_wait<0>();
    keep(part);
#pragma unroll
    for (int j = 0; j < 68; j++) sums[j] += part[j];

    u16* own_out = out + (head / heads_of_batch) * batch_stride + (head % heads_of_batch) * head_stride;
    const float* own_v_scale = v_scale + (size_t)head * TILE;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const float inverse = 1.0f / sums[64 + 2 * row];
        const int token = first_row + 8 * row;
        if (token >= queries) continue;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int channel = 8 * i + 2 * (lane % 4);
            const float low = sums[4 * i + 2 * row] * inverse * own_v_scale[channel];
            const float high = sums[4 * i + 2 * row + 1] * inverse * own_v_scale[channel + 1];
            u32 both;
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
            *reinterpret_cast<u32*>(own_out + token * token_stride + channel) = both;
        }
    }
}
