// The tiny decoder's 64-channel layers for Hopper (sm_90a): float16 or float8 maps, float32 sums.
//
// Every map is NHWC with 64 channels, so a pixel is 128 bytes: one row of the 128-byte swizzle that both the bulk copy
// engine (TMA) and the tensor cores (wgmma) know. A row of pixels in shared memory is therefore an operand as it lies,
// and a 3x3 kernel's tap is the same operand read from another pixel on: nothing is unfolded, a pixel is loaded once.
//
//   conv_relu_*, conv_residual_*   3x3 convolution; the 64 output channels are the rows (M) of the product, TILE pixels
//                                  of an image row its columns (N). out = ReLU(conv + bias [+ residual]).
//   up_*                           nearest upsampling by 2 and a 3x3 convolution, folded: output pixel (2y+a, 2x+b) is
//                                  a 2x2 convolution with weights of its own. A block has one a, a warpgroup one b.
//   conv_last_128                  conv_residual, whose result is not written: the last convolution, 64 -> 3 channels,
//                                  is begun on the tile while it is in shared memory. Its 27 (tap, colour) products of
//                                  a pixel are added up along the row; what is left to add are three rows, and at a
//                                  tile's edges one column of the neighbour.
//   *8_128                         the same with float8 (e4m3) maps between a block's convolutions; its input and
//                                  output stay float16: `to8` writes float8, `8to8` reads and writes it, `8` reads it.
//   sum_last                       adds those, clamps to [0, 1], writes I420 planes (BT.709 limited) or RGB.
// The number in a name is TILE, the pixels of a tile's row: 64, 128 or 256.
//
// One block per multiprocessor, three warpgroups. The first is the producer: its one thread keeps a ring of image rows
// in shared memory filled. The others are consumers and take turns: while one's products run, the other writes its
// results out. Blocks walk down strips TILE pixels wide, so a tile needs one new row.
// All weights of a layer stay in shared memory, as packing.py has laid them out.
//
// One file, because it is one program for NVRTC: instructions, ring, convolutions, last sums, in this order.
// To try another tile: TILE must be a multiple of 64, at most 256; `shared_bytes` in launching.py must agree.

// No include: NVRTC then needs no headers on the machine.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short Half;  // the bits of a float16

struct alignas(64) TensorMap {  // CUtensorMap; cuda.h cannot be included under NVRTC
    u64 words[16];
};

constexpr int PIXEL_BYTES = 128;           // 64 channels of float16
constexpr int TAP_BYTES = 64 * 128;        // 64 x 64 weights of one tap
constexpr int PIXEL8_BYTES = 64;           // 64 channels of float8: a row of the 64-byte swizzle
constexpr int PIECE = 64;                  // pixels that a warpgroup writes out at a time
constexpr int STAGING_BYTES = PIECE * PIXEL_BYTES;
constexpr int CONSUMERS = 2;
constexpr int WARPGROUP = 128;

// ---- The instructions, each under a name ----------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done; \n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; \n"
        "@done bra over; bra again; over: }" ::"r"(barrier), "r"(parity) : "memory");
}

// A named barrier of `threads` threads: 0 is __syncthreads'.
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void load_bytes(u32 to, const void* from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// A box of pixels of one row; what lies outside the picture comes as zeros, which is the convolution's padding.
__device__ __forceinline__ void load_pixels(u32 to, const TensorMap* map, int x, int y, int n, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(to), "l"(map), "r"(0), "r"(x), "r"(y), "r"(n), "r"(barrier) : "memory");
}

// wgmma's view of 64-half rows in the 128-byte swizzle: 8 rows are 1024 bytes. The start may be any row and any 32nd
// byte, because the swizzle is a function of the absolute address; the descriptor's base offset stays 0.
// Of float8, rows and swizzle are half as long.
template <int ROW_BYTES = PIXEL_BYTES>
__device__ __forceinline__ u64 operand(u32 address) {
    constexpr u64 SWIZZLE = u64(ROW_BYTES == 128 ? 1 : 2) << 62, EIGHT_ROWS = u64(8 * ROW_BYTES >> 4) << 32;
    constexpr u64 UNUSED = u64(1) << 16;
    return SWIZZLE | EIGHT_ROWS | UNUSED | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The empty statements tell the compiler that the sums change here: it must not read them earlier.
template <int COUNT>
__device__ __forceinline__ void products_wait(float (&sums)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Four 8x8 tiles of halves, transposed on the way: sums have channels as rows, memory wants them inside a pixel.
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Product<N>::add(d, a, b, keeps): d (64 x N) = a (64 x 16) b (16 x N), plus what d held if `keeps`. A thread holds
// d[4i + 2r + c]: row 16 warp + lane / 4 + 8 r, column 8 i + 2 (lane % 4) + c.
template <int N>
struct Product;
// The same of float8, a (64 x 32) and b (32 x N): 32 bytes of a row again.
template <int N>
struct Product8;

#define REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 \
    REGISTERS_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128 \
    REGISTERS_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)

// COUNT sums a thread; A, B and KEEPS are the operands' numbers behind them.
#define PRODUCT(NAME, N, COUNT, SHAPE, A, B, KEEPS, MODES)                                                          \
    template <>                                                                                                     \
    struct NAME<N> {                                                                                                \
        __device__ static void add(float (&d)[COUNT], u64 a, u64 b, int keeps) {                                    \
            asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #KEEPS ", 0; wgmma.mma_async.sync.aligned." SHAPE " {"  \
                         REGISTERS_##COUNT "}, %" #A ", %" #B ", p, 1, 1" MODES "; }"                               \
                         : SUMS_##COUNT(0)                                                                          \
                         : "l"(a), "l"(b), "r"(keeps));                                                             \
        }                                                                                                           \
    };

PRODUCT(Product, 64, 32, "m64n64k16.f32.f16.f16", 32, 33, 34, ", 0, 0")
PRODUCT(Product, 128, 64, "m64n128k16.f32.f16.f16", 64, 65, 66, ", 0, 0")
PRODUCT(Product, 256, 128, "m64n256k16.f32.f16.f16", 128, 129, 130, ", 0, 0")
PRODUCT(Product8, 128, 64, "m64n128k32.f32.e4m3.e4m3", 64, 65, 66, "")

// ---- The ring of image rows -----------------------------------------------------------------------------------------

// How a kernel walks: TILE pixels wide, ROWS image rows a tile, one row down from tile to tile, RING rows held.
template <int TILE_, int ROWS_, int RING_, int PIXEL_>
struct Walk {
    static constexpr int TILE = TILE_, ROWS = ROWS_, RING = RING_, PIXEL = PIXEL_;  // PIXEL in bytes
    static constexpr int ROW_PIXELS = TILE + 2;                  // a neighbour on both sides
    static constexpr int BOXES = ROW_PIXELS > 256 ? 2 : 1;       // the copy engine's boxes have at most 256 pixels
    static constexpr int BOX_PIXELS = ROW_PIXELS / BOXES;
    static constexpr int SLOT_BYTES = (ROW_PIXELS * PIXEL + 1023) / 1024 * 1024;
    static constexpr int RING_BYTES = RING * SLOT_BYTES;
};

// Tiles of one strip that follow each other downwards: the ring is filled anew for each segment.
struct Segment {
    int n, x, y, tiles;  // picture, left pixel, first tile's number from the top
};

// The tiles [first, end) of this worker of `workers`, cut into segments.
template <int TILE>
struct Range {
    int tile, end, strips, height;

    __device__ Range(int worker, int workers, int count, int rows, int width) {
        strips = (width + TILE - 1) / TILE;
        height = rows;
        long long total = (long long)count * strips * height;
        tile = int(total * worker / workers);
        end = int(total * (worker + 1) / workers);
    }

    __device__ bool next(Segment& segment) {
        if (tile >= end) return false;
        int strip = tile / height;
        segment.y = tile % height;
        segment.n = strip / strips;
        segment.x = strip % strips * TILE;
        segment.tiles = min(end - tile, height - segment.y);
        tile += segment.tiles;
        return true;
    }
};

template <class W>
__device__ int rows_of(const Segment& segment) {
    return segment.tiles + W::ROWS - 1;
}

// Barriers in shared memory: full[RING], empty[RING], weights.
template <class W>
struct Ring {
    u32 rows, barriers;

    __device__ u32 row(int index) const { return rows + index % W::RING * W::SLOT_BYTES; }
    __device__ u32 full(int index) const { return barriers + index % W::RING * 8; }
    __device__ u32 empty(int index) const { return barriers + (W::RING + index % W::RING) * 8; }
    __device__ u32 weights() const { return barriers + 2 * W::RING * 8; }

    __device__ void init() const {
        for (int slot = 0; slot < W::RING; ++slot) {
            barrier_init(full(slot), 1);
            barrier_init(empty(slot), 4 * CONSUMERS);  // each warp of each consumer
        }
        barrier_init(weights(), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    // Producer: row `index` of this block's life is row `y` of picture `n`.
    __device__ void load(int index, const TensorMap* map, int x, int y, int n) const {
        if (index >= W::RING) barrier_wait(empty(index), (index / W::RING - 1) & 1);
        barrier_expect(full(index), W::ROW_PIXELS * W::PIXEL);
        for (int box = 0; box < W::BOXES; ++box) {
            u32 to = row(index) + box * W::BOX_PIXELS * W::PIXEL;
            load_pixels(to, map, x - 1 + box * W::BOX_PIXELS, y, n, full(index));
        }
    }
};

// One consumer's place in the ring. It waits for and releases every row once, in order, also rows it does not read:
// so a barrier never sees two arrivals of one warp in the same round.
template <class W>
struct Place {
    const Ring<W>& ring;
    int waited = 0, released = 0;

    __device__ explicit Place(const Ring<W>& ring) : ring(ring) {}

    __device__ void wait_below(int row) {
        for (; waited < row; ++waited) barrier_wait(ring.full(waited), (waited / W::RING) & 1);
    }

    __device__ void release_below(int row) {
        wait_below(row);
        __syncwarp();
        for (; released < row; ++released) {
            if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(released));
        }
    }
};

// Consumers issue their products in turns, so that one's run while the other writes out.
__device__ __forceinline__ void turn_begin(int consumer) { named_sync(3 + consumer, 2 * WARPGROUP); }
__device__ __forceinline__ void turn_end(int consumer) { named_arrive(3 + (consumer ^ 1), 2 * WARPGROUP); }

// What all kernels begin with: aligned shared memory, barriers, weights on their way. Weights never change, so they
// are fetched before the kernel before this one has ended (programmatic dependent launch).
template <class W>
__device__ u32 begin(Ring<W>& ring, const char* weights, int weight_bytes, int staging_bytes) {
    extern __shared__ char memory[];
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    ring.rows = base + weight_bytes;
    ring.barriers = ring.rows + W::RING_BYTES + staging_bytes;
    if (threadIdx.x == 0) {
        ring.init();
        barrier_expect(ring.weights(), weight_bytes);
        load_bytes(base, weights, weight_bytes, ring.weights());
    }
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    return base;
}

template <class W>
__device__ void produce(const Ring<W>& ring, Range<W::TILE> range, const TensorMap* map, int rows_above) {
    Segment segment;
    int index = 0;
    while (range.next(segment)) {
        int top = segment.y - rows_above;
        for (int row = 0; row < rows_of<W>(segment); ++row, ++index) {
            ring.load(index, map, segment.x, top + row, segment.n);
        }
    }
}

#define BECOME_PRODUCER() asm volatile("setmaxnreg.dec.sync.aligned.u32 24;")
#define BECOME_CONSUMER() asm volatile("setmaxnreg.inc.sync.aligned.u32 240;")

// ---- Convolutions that keep 64 channels -----------------------------------------------------------------------------

enum Kind { RELU, RESIDUAL, UP, LAST };

// IN8, OUT8: whether it reads and writes float8. Then sums are scaled, channel by channel, before the bias is added.
template <int TILE, Kind KIND, bool IN8 = false, bool OUT8 = false>
struct Conv {
    static constexpr int ROWS = KIND == UP ? 2 : 3, COLUMNS = ROWS;       // taps down and across
    static constexpr int STEP = KIND == UP ? 1 : CONSUMERS;               // from a consumer's tile to its next
    static constexpr int PIXEL = IN8 ? PIXEL8_BYTES : PIXEL_BYTES, TAP = 64 * PIXEL;
    static constexpr bool READS_8 = IN8, SCALES = IN8 || OUT8;
    static constexpr int WEIGHT_BYTES = (KIND == UP ? 8 : 9) * TAP + (KIND == LAST ? TAP_BYTES : 0);
    static constexpr int STAGED_BYTES = KIND == LAST ? TILE * PIXEL_BYTES : STAGING_BYTES;  // of one consumer
    static constexpr bool ADDS = KIND == RESIDUAL || KIND == LAST;
    static constexpr int CHUNKS = TILE / 16;                              // 16 bytes each, that a thread writes a tile
    using W = Walk<TILE, ROWS, (TILE == 256 ? 4 : 6), PIXEL>;
};

// The product of one tile: all taps, 16 input channels at a time. `row` counts in the ring, `column` is the first
// tap's pixel there.
template <class C, int TILE>
__device__ __forceinline__ void multiply(float (&sums)[TILE / 2], const Ring<typename C::W>& ring, int row, u32 weights,
                                         int column) {
    products_begin();
#pragma unroll
    for (int dy = 0; dy < C::ROWS; ++dy) {
        u32 pixels = ring.row(row + dy) + column * C::PIXEL;
#pragma unroll
        for (int dx = 0; dx < C::COLUMNS; ++dx) {
#pragma unroll
            for (int k = 0; k < C::PIXEL / 32; ++k) {
                u64 a = operand<C::PIXEL>(weights + (dy * C::COLUMNS + dx) * C::TAP + k * 32);
                u64 b = operand<C::PIXEL>(pixels + dx * C::PIXEL + k * 32);
                if constexpr (C::READS_8) Product8<TILE>::add(sums, a, b, dy + dx + k > 0);
                else Product<TILE>::add(sums, a, b, dy + dx + k > 0);
            }
        }
    }
    products_commit();
}

// Where 8 channels of a pixel lie in the staging buffer: in the swizzle again, so that products can read it.
__device__ __forceinline__ u32 staged_at(u32 staging, int pixel, int chunk) {
    return staging + pixel * PIXEL_BYTES + ((chunk ^ (pixel % 8)) << 4);
}

// What happens to sums of this thread's two channels: scale and bias; scales are 1 where nothing is float8.
struct Affine {
    float2 scale, bias;

    __device__ float apply(float sum, int second) const {
        return second ? fmaf(sum, scale.y, bias.y) : fmaf(sum, scale.x, bias.x);
    }
};

// 64 pixels of sums, with bias, as halves into the staging buffer.
template <Kind KIND, int TILE>
__device__ __forceinline__ void stage(const float (&sums)[TILE / 2], int piece, u32 staging, Affine channels) {
    int warp = threadIdx.x % WARPGROUP / 32, lane = threadIdx.x % 32;
    int matrix = lane / 8, chunk = 2 * warp + matrix % 2;
#pragma unroll
    for (int group = 0; group < 8; group += 2) {
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int at = 4 * (piece * 8 + group + i / 2) + 2 * (i % 2);
            float low = channels.apply(sums[at], i % 2), high = channels.apply(sums[at + 1], i % 2);
            if (KIND == RELU) low = fmaxf(low, 0.f), high = fmaxf(high, 0.f);
            packed[i] = pair(low, high);
        }
        u32 to = staged_at(staging, (group + matrix / 2) * 8 + lane % 8, chunk);
        store_transposed(to, packed[0], packed[1], packed[2], packed[3]);
    }
}

__device__ __forceinline__ uint4 read_16(u32 from) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(from) : "memory");
    return value;
}

__device__ __forceinline__ void write_16(u32 to, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w) : "memory");
}

__device__ __forceinline__ u32 add_relu(u32 a, u32 b) {
    u32 sum;
    asm("{ .reg .b32 s; add.rn.f16x2 s, %1, %2; max.f16x2 %0, s, %3; }" : "=r"(sum) : "r"(a), "r"(b), "r"(0));
    return sum;
}

__device__ __forceinline__ uint4 add_relu(uint4 a, uint4 b) {
    return make_uint4(add_relu(a.x, b.x), add_relu(a.y, b.y), add_relu(a.z, b.z), add_relu(a.w, b.w));
}

// The tile to memory, 64 pixels at a time. `to` is where this thread's first chunk goes; of the row's pixels, `pixels`
// lie in the picture.
template <int TILE, Kind KIND, int KEPT>
__device__ __forceinline__ void write_map(const float (&sums)[TILE / 2], const uint4 (&kept)[KEPT], u32 staging,
                                          Affine channels, int consumer, int pixels, Half* to) {
    constexpr int SPREAD = KIND == UP ? 2 : 1;
    int thread = threadIdx.x % WARPGROUP;
#pragma unroll
    for (int piece = 0; piece < TILE / PIECE; ++piece) {
        named_sync(1 + consumer, WARPGROUP);  // all have read what was staged before
        stage<KIND, TILE>(sums, piece, staging, channels);
        named_sync(1 + consumer, WARPGROUP);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            int pixel = thread / 8 + 16 * c, whole = piece * 4 + c;
            uint4 value = read_16(staged_at(staging, pixel, thread % 8));
            if constexpr (KIND == RESIDUAL) value = add_relu(value, kept[whole]);
            if (piece * PIECE + pixel < pixels) *reinterpret_cast<uint4*>(to + whole * 16 * 64 * SPREAD) = value;
        }
    }
}

__device__ __forceinline__ u32 pair8(float low, float high) {
    unsigned short packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

// Where 16 float8 channels of a pixel lie in the staging buffer: swizzled, to keep threads off each other's banks.
__device__ __forceinline__ u32 staged8_at(u32 staging, int pixel, int chunk) {
    return staging + pixel * PIXEL8_BYTES + ((chunk ^ (pixel / 2 % 4)) << 4);
}

// The tile to memory as float8, with ReLU. packing.py orders the weights so that a thread's two channels are
// neighbours: a pair of them is 16 bits, which the transposing store moves like a half. `to` is the tile's first pixel.
template <int TILE>
__device__ __forceinline__ void write_map8(const float (&sums)[TILE / 2], u32 staging, Affine channels, int consumer,
                                           int pixels, char* to) {
    int thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int piece = 0; piece < TILE / PIECE; ++piece) {
        named_sync(1 + consumer, WARPGROUP);  // all have read what was staged before
#pragma unroll
        for (int group = 0; group < 8; group += 4) {
            u32 packed[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int at = 4 * (piece * 8 + group + i);
                u32 both[2];
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    float first = fmaxf(channels.apply(sums[at + p], 0), 0.f);
                    both[p] = pair8(first, fmaxf(channels.apply(sums[at + 2 + p], 1), 0.f));
                }
                packed[i] = both[0] | both[1] << 16;
            }
            u32 place = staged8_at(staging, (group + lane / 8) * 8 + lane % 8, warp);
            store_transposed(place, packed[0], packed[1], packed[2], packed[3]);
        }
        named_sync(1 + consumer, WARPGROUP);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            int pixel = thread / 4 + 32 * c, chunk = thread % 4, x = piece * PIECE + pixel;
            uint4 value = read_16(staged8_at(staging, pixel, chunk));
            if (x < pixels) *reinterpret_cast<uint4*>(to + x * PIXEL8_BYTES + chunk * 16) = value;
        }
    }
}

// The tile, with residual and ReLU, whole into the staging buffer: for products to read.
template <int TILE, int KEPT>
__device__ __forceinline__ void stage_block(const float (&sums)[TILE / 2], const uint4 (&kept)[KEPT], u32 staging,
                                            Affine channels, int consumer, int pixels) {
    int thread = threadIdx.x % WARPGROUP;
    named_sync(1 + consumer, WARPGROUP);  // all have read the sums of the tile before
#pragma unroll
    for (int piece = 0; piece < TILE / PIECE; ++piece) {
        stage<LAST, TILE>(sums, piece, staging + piece * STAGING_BYTES, channels);
    }
    named_sync(1 + consumer, WARPGROUP);
#pragma unroll
    for (int c = 0; c < KEPT; ++c) {
        int pixel = thread / 8 + 16 * c;
        u32 place = staged_at(staging, pixel, thread % 8);
        // Outside the picture are zeros: the last convolution's padding.
        write_16(place, pixel < pixels ? add_relu(read_16(place), kept[c]) : uint4());
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // products read what threads wrote
    named_sync(1 + consumer, WARPGROUP);
}

// The last convolution, begun: what conv_last leaves to sum_last. A plane is (row dy of the kernel, colour).
//   rows   Half (N, 9, H, W): a pixel's sum over the kernel's columns, of the pixels of its own tile
//   edges  Half (N, H, strips, 2, 9): what a tile's row adds to the pixel left of it, and right of it
// Product 3 plane + dx is that of the plane and column dx; seven of the tenth tap's rows belong to each warp.
struct Begun {
    Half *rows, *edges;
};

__device__ __forceinline__ Half half(float value) {
    Half bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// One staged tile, of which `pixels` lie in the picture, times the tenth tap; `taps` is where that lies.
template <int TILE>
__device__ __forceinline__ void begin_last(Begun begun, u32 taps, u32 staging, int consumer, const Segment& at, int y,
                                           int height, int width) {
    constexpr int ROW = TILE + 8;  // floats from row to row: keeps threads off each other's banks
    int thread = threadIdx.x % WARPGROUP;
    float sums[TILE / 2];
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) Product<TILE>::add(sums, operand(taps + k * 32), operand(staging + k * 32), k > 0);
    products_commit();
    products_wait(sums);
    named_sync(1 + consumer, WARPGROUP);  // all have read the tile: its place is free for the sums

    extern __shared__ char memory[];
    float* shared = reinterpret_cast<float*>(memory + (staging - shared_address(memory)));
    int place = thread % 32 / 4, product = 7 * (thread / 32) + place;
    if (place < 7 && product < 27) {
        float* to = shared + product * ROW + thread % 4 * 2;
#pragma unroll
        for (int i = 0; i < TILE / 8; ++i) {
            *reinterpret_cast<float2*>(to + 8 * i) = make_float2(sums[4 * i], sums[4 * i + 1]);
        }
    }
    named_sync(1 + consumer, WARPGROUP);
    int x = at.x + thread;  // TILE threads, a pixel each
    if (x < width) {
        Half* to = begun.rows + ((long long)at.n * 9 * height + y) * width + x;
#pragma unroll
        for (int plane = 0; plane < 9; ++plane, to += (long long)height * width) {
            const float* from = shared + 3 * plane * ROW + thread;
            float sum = from[ROW];
            if (thread > 0) sum += from[-1];
            if (thread < TILE - 1) sum += from[2 * ROW + 1];
            *to = half(sum);
        }
    }
    if (thread < 18) {
        int plane = thread % 9, is_right = thread / 9, strips = (width + TILE - 1) / TILE;
        const float* from = shared + 3 * plane * ROW;
        Half* to = begun.edges + (((long long)at.n * height + y) * strips + at.x / TILE) * 18 + thread;
        *to = half(is_right ? from[TILE - 1] : from[2 * ROW]);
    }
}

// bias: 64 floats, and behind them 64 scales if float8 is read or written. height, width: of the input.
// Input and residual have the output's size, but for UP, where it is twice the input's.
template <int TILE, Kind KIND, bool IN8 = false, bool OUT8 = false>
__device__ __forceinline__ void convolve(const TensorMap* input, const char* weights, const float* bias,
                                         const Half* residual, Half* output, Begun begun, int count,
                                         int height, int width) {
    using C = Conv<TILE, KIND, IN8, OUT8>;
    using W = typename C::W;
    constexpr int PHASES = KIND == UP ? 2 : 1;
    int phase = blockIdx.x % PHASES;  // UP: odd or even output rows
    Ring<W> ring;
    u32 base = begin(ring, weights + phase * C::WEIGHT_BYTES, C::WEIGHT_BYTES, CONSUMERS * C::STAGED_BYTES);
    Range<TILE> range(blockIdx.x / PHASES, gridDim.x / PHASES, count, height, width);

    // The shuffle tells the compiler that all threads of a warp agree; without it wgmma is serialised.
    int group = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
    if (group == 0) {
        BECOME_PRODUCER();
        if (threadIdx.x == 0) produce<W>(ring, range, input, KIND == UP ? 1 - phase : 1);
        return;
    }
    BECOME_CONSUMER();
    int consumer = group - 1, thread = threadIdx.x % WARPGROUP;
    int channel = thread / 32 * 16 + thread % 32 / 4;
    Affine channels = {make_float2(1.f, 1.f), make_float2(0.f, 0.f)};
    if (KIND != UP) channels.bias = make_float2(bias[channel], bias[channel + 8]);
    if (C::SCALES) channels.scale = make_float2(bias[64 + channel], bias[64 + channel + 8]);
    u32 staging = ring.rows + W::RING_BYTES + consumer * C::STAGED_BYTES;
    u32 taps = base + (KIND == UP ? consumer * 4 * C::TAP : 0);
    int column = KIND == UP ? consumer : 0;
    if (consumer == 1) turn_end(1);  // the first turn is consumer 0's
    barrier_wait(ring.weights(), 0);

    Place<W> place(ring);
    Segment segment;
    int row = 0, tile = 0;  // rows and tiles of all segments before
    while (range.next(segment)) {
        int first = KIND == UP ? 0 : (consumer ^ tile) & 1;
        for (int i = first; i < segment.tiles; i += C::STEP) {
            float sums[TILE / 2];
            place.wait_below(row + i + C::ROWS);
            turn_begin(consumer);
            multiply<C, TILE>(sums, ring, row + i, taps, column);
            turn_end(consumer);

            // This thread writes chunk `thread % 8` of pixels thread / 8, and every 16th from there.
            int y = segment.y + i, pixels = width - segment.x;
            long long line = KIND == UP ? ((long long)segment.n * height * 2 + 2 * y + phase) * width * 2 + consumer
                                        : ((long long)segment.n * height + y) * width;
            constexpr int SPREAD = KIND == UP ? 2 : 1;  // UP: every second pixel is the other consumer's
            long long at = (line + (long long)SPREAD * (segment.x + thread / 8)) * 64 + thread % 8 * 8;
            uint4 kept[C::ADDS ? C::CHUNKS : 1];
            if (C::ADDS) {
#pragma unroll
                for (int c = 0; c < C::CHUNKS; ++c) {
                    bool inside = thread / 8 + 16 * c < pixels;
                    kept[c] = inside ? *reinterpret_cast<const uint4*>(residual + at + c * 16 * 64) : uint4();
                }
            }
            products_wait(sums);
            place.release_below(row + i + C::STEP);

            if constexpr (KIND == LAST) {
                stage_block<TILE>(sums, kept, staging, channels, consumer, pixels);
                begin_last<TILE>(begun, base + 9 * C::TAP, staging, consumer, segment, y, height, width);
            } else if constexpr (OUT8) {
                char* to = reinterpret_cast<char*>(output) + (line + segment.x) * PIXEL8_BYTES;
                write_map8<TILE>(sums, staging, channels, consumer, pixels, to);
            } else {
                write_map<TILE, KIND>(sums, kept, staging, channels, consumer, pixels, output + at);
            }
        }
        row += rows_of<W>(segment);
        tile += segment.tiles;
        place.release_below(row);
    }
}

#define KERNEL(NAME) extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) NAME

#define CONVOLUTION(NAME, TILE, ...)                                                                             \
    KERNEL(NAME##_##TILE)                                                                                        \
    (const __grid_constant__ TensorMap input, const char* weights, const float* bias, const Half* residual,      \
     Half* output, int count, int height, int width) {                                                           \
        convolve<TILE, __VA_ARGS__>(&input, weights, bias, residual, output, Begun(), count, height, width);     \
    }

CONVOLUTION(conv_relu, 64, RELU)
CONVOLUTION(conv_relu, 128, RELU)
CONVOLUTION(conv_relu, 256, RELU)
CONVOLUTION(conv_residual, 64, RESIDUAL)
CONVOLUTION(conv_residual, 128, RESIDUAL)
CONVOLUTION(conv_residual, 256, RESIDUAL)
CONVOLUTION(up, 64, UP)
CONVOLUTION(conv_relu_to8, 128, RELU, false, true)
CONVOLUTION(conv_relu_8to8, 128, RELU, true, true)
CONVOLUTION(conv_residual_8, 128, RESIDUAL, true)

KERNEL(conv_last_8_128)
(const __grid_constant__ TensorMap input, const char* weights, const float* bias, const Half* residual, Half* rows,
 Half* edges, int count, int height, int width) {
    convolve<128, LAST, true>(&input, weights, bias, residual, nullptr, Begun{rows, edges}, count, height, width);
}

KERNEL(conv_last_128)
(const __grid_constant__ TensorMap input, const char* weights, const float* bias, const Half* residual, Half* rows,
 Half* edges, int count, int height, int width) {
    convolve<128, LAST>(&input, weights, bias, residual, nullptr, Begun{rows, edges}, count, height, width);
}

// ---- The last convolution's sums, and colours -----------------------------------------------------------------------

__device__ __forceinline__ float colour(float value) {
    return value != value ? 0.5f : fminf(fmaxf(value, 0.f), 1.f);  // NaN is grey, as in colour.py
}

// BT.709, limited range, rounded with ties down: the same numbers as colour.py's BT709_LIMITED.
constexpr float KR = 0.2126f, KB = 0.0722f, HALF = 0.5f - 1.f / 1024;

__device__ __forceinline__ float luma(float3 c) { return KR * c.x + (1 - KR - KB) * c.y + KB * c.z; }

__device__ __forceinline__ unsigned char code(float value) { return static_cast<unsigned char>(value + HALF); }

// One 2x2 box of I420: four lumas, and the chroma of their mean.
__device__ __forceinline__ void write_box(unsigned char* planes, const float3 (&box)[2][2], int x, int y, int height,
                                          int width) {
    float3 mean = make_float3(0.f, 0.f, 0.f);
#pragma unroll
    for (int dy = 0; dy < 2; ++dy) {
#pragma unroll
        for (int dx = 0; dx < 2; ++dx) {
            float3 c = box[dy][dx];
            mean.x += c.x / 4, mean.y += c.y / 4, mean.z += c.z / 4;
        }
        uchar2 lumas = make_uchar2(code(16 + 219 * luma(box[dy][0])), code(16 + 219 * luma(box[dy][1])));
        *reinterpret_cast<uchar2*>(planes + (long long)(y + dy) * width + x) = lumas;
    }
    unsigned char* blue = planes + (long long)height * width + (long long)(y / 2) * (width / 2) + x / 2;
    float grey = luma(mean);
    blue[0] = code(128 + 224 * (mean.z - grey) / (2 * (1 - KB)));
    blue[(long long)(height / 2) * (width / 2)] = code(128 + 224 * (mean.x - grey) / (2 * (1 - KR)));
}

__device__ __forceinline__ void write_rgb(Half* rgb, const float3 (&box)[2][2], int x, int y, int height, int width) {
#pragma unroll
    for (int dy = 0; dy < 2; ++dy) {
        float3 a = box[dy][0], b = box[dy][1];
        u32* at = reinterpret_cast<u32*>(rgb + (long long)(y + dy) * width + x);
        long long plane = (long long)height * width / 2;  // in pairs
        at[0] = pair(a.x, b.x);
        at[plane] = pair(a.y, b.y);
        at[2 * plane] = pair(a.z, b.z);
    }
}

__device__ __forceinline__ float single(Half bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// A thread makes one 2x2 box; the grid is boxes across / SUM_THREADS, boxes down, pictures. planes: (N, H * 3 / 2, W)
// bytes, or null, and then rgb: (N, 3, H, W) halves. height and width are even.
constexpr int SUM_THREADS = 128;

extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    sum_last(const Half* rows, const Half* edges, const float* bias, unsigned char* planes, Half* rgb, int,
             int height, int width) {
    constexpr int TILE = 128;  // conv_last's
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int x = 2 * (blockIdx.x * SUM_THREADS + threadIdx.x), y = 2 * blockIdx.y, n = blockIdx.z;
    int strip = x / TILE, strips = (width + TILE - 1) / TILE;
    if (x >= width) return;
    bool has_left = x % TILE == 0 && x > 0, has_right = (x + 2) % TILE == 0 && x + 2 < width;
    float sums[2][2][3];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int c = 0; c < 3; ++c) sums[row][0][c] = sums[row][1][c] = bias[c];
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
            int from = y + row + dy - 1;
            if (from < 0 || from >= height) continue;
            const Half* edge = edges + (((long long)n * height + from) * strips + strip) * 18;
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                int plane = dy * 3 + c;
                const Half* at = rows + (((long long)n * 9 + plane) * height + from) * width + x;
                u32 both = *reinterpret_cast<const u32*>(at);
                sums[row][0][c] += single(Half(both & 0xffff));
                sums[row][1][c] += single(Half(both >> 16));
                if (has_left) sums[row][0][c] += single(edge[plane - 9]);    // the strip before: its right edge
                if (has_right) sums[row][1][c] += single(edge[plane + 18]);  // the strip behind: its left edge
            }
        }
    }
    float3 box[2][2];
#pragma unroll
    for (int at = 0; at < 4; ++at) {
        float(&sum)[3] = sums[at / 2][at % 2];
        box[at / 2][at % 2] = make_float3(colour(sum[0]), colour(sum[1]), colour(sum[2]));
    }
    long long area = (long long)height * width;
    if (planes) write_box(planes + n * area * 3 / 2, box, x, y, height, width);
    else write_rgb(rgb + n * area * 3, box, x, y, height, width);
}
