// H.264 pictures straight from planes on the device: Constrained Baseline, CAVLC, one slice a row of macroblocks.
//
//   code_rows   a warp codes one row. Its macroblocks are coded one after the other, for each is predicted from the one
//               to its left; what can be done side by side within one, its lanes do.
//   join_rows   a block lays the rows of one picture side by side, in the host's memory.
//
// A macroblock is Intra16x16, predicted from its left neighbour alone, so that rows need nothing of each other. In a
// picture that follows another, one that has hardly changed since it was coded is skipped (P_Skip): with
// constrained_intra_pred no coded one is predicted from a skipped one, and so nothing of what a decoder has made,
// which includes its deblocking, must be known here. Names of syntax elements are those of ITU-T H.264.
//
// Each step of code_rows is a block FOR_LANES … END_LANES, and keeps what later steps need in shared memory: so the
// same source runs without a GPU, lane by lane, where a test compiles it with a C++ compiler.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#define TABLE __device__ const
#define FOR_LANES { const int lane = threadIdx.x & 31;
#define END_LANES } __syncwarp();
#define WAIT_FOR_LANES __syncwarp()
#define UNROLLED _Pragma("unroll")
#define OR_WORD(word, bits) atomicOr(word, bits)
#else
#define KERNEL extern "C"
#define DEVICE static inline
#define TABLE static const
#define FOR_LANES for (int lane = 0; lane < 32; ++lane) {
#define END_LANES }
#define WAIT_FOR_LANES
#define UNROLLED
#define OR_WORD(word, bits) (*(word) |= (bits))
#endif

constexpr int LUMA = 16;                // 4x4 blocks of a macroblock, in the standard's order
constexpr int BLOCKS = 24;              // with those of Cb and Cr
constexpr int STRIDE = 18;              // of a block's coefficients: lanes that go through theirs meet in no bank
constexpr int PIECES = 28;              // of a macroblock's bits: header, luma DC, 16 luma AC, 2 chroma DC, 8 chroma AC
constexpr int PIECE_WORDS = 19;         // 16 coefficients of 28 bits, and their token, zeros and runs
constexpr int MOST_MACROBLOCK = 1600;   // bytes
constexpr int LEAST_MACROBLOCK = 4;     // bytes, without a residual
constexpr int REFRESH = 64;             // pictures until each row has been coded anew
constexpr int SKIP_ERROR = 2 * 384;     // of the squares of a macroblock's changes: 2 a sample, 45 dB

// ---- Tables: 9.2.1, 9.2.3, 8.5.6 ------------------------------------------------------------------------------------

// Length and bits of coeff_token by [nC's class][TotalCoeff][TrailingOnes]; the last class is chroma DC's. From an nC
// of 8 on it takes a fixed six bits.
TABLE u8 TOKEN_LENGTH[4][68] = {
    {1,0,0,0, 6,2,0,0, 8,6,3,0, 9,8,7,5, 10,9,8,6, 11,10,9,7, 13,11,10,8, 13,13,11,9, 13,13,13,10, 14,14,13,11,
     14,14,14,13, 15,15,14,14, 15,15,15,14, 16,15,15,15, 16,16,16,15, 16,16,16,16, 16,16,16,16},
    {2,0,0,0, 6,2,0,0, 6,5,3,0, 7,6,6,4, 8,6,6,4, 8,7,7,5, 9,8,8,6, 11,9,9,6, 11,11,11,7, 12,11,11,9,
     12,12,12,11, 12,12,12,11, 13,13,13,12, 13,13,13,13, 13,14,13,13, 14,14,14,13, 14,14,14,14},
    {4,0,0,0, 6,4,0,0, 6,5,4,0, 6,5,5,4, 7,5,5,4, 7,5,5,4, 7,6,6,4, 7,6,6,4, 8,7,7,5, 8,8,7,6,
     9,8,8,7, 9,9,8,8, 9,9,9,8, 10,9,9,9, 10,10,10,10, 10,10,10,10, 10,10,10,10},
    {2,0,0,0, 6,1,0,0, 6,6,3,0, 6,7,7,6, 6,8,8,7},
};
TABLE u8 TOKEN_BITS[4][68] = {
    {1,0,0,0, 5,1,0,0, 7,4,1,0, 7,6,5,3, 7,6,5,3, 7,6,5,4, 15,6,5,4, 11,14,5,4, 8,10,13,4, 15,14,9,4,
     11,10,13,12, 15,14,9,12, 11,10,13,8, 15,1,9,12, 11,14,13,8, 7,10,9,12, 4,6,5,8},
    {3,0,0,0, 11,2,0,0, 7,7,3,0, 7,10,9,5, 7,6,5,4, 4,6,5,6, 7,6,5,8, 15,6,5,4, 11,14,13,4, 15,10,9,4,
     11,14,13,12, 8,10,9,8, 15,14,13,12, 11,10,9,12, 7,11,6,8, 9,8,10,1, 7,6,5,4},
    {15,0,0,0, 15,14,0,0, 11,15,13,0, 8,12,14,12, 15,10,11,11, 11,8,9,10, 9,14,13,9, 8,10,9,8, 15,14,13,13,
     11,14,10,12, 15,10,13,12, 11,14,9,12, 8,10,13,8, 13,7,9,12, 9,12,11,10, 5,8,7,6, 1,4,3,2},
    {1,0,0,0, 7,1,0,0, 4,6,1,0, 3,3,2,5, 2,3,2,0},
};
TABLE u8 ZEROS_LENGTH[15][16] = {
    {1,3,3,4,4,5,5,6,6,7,7,8,8,9,9,9}, {3,3,3,3,3,4,4,4,4,5,5,6,6,6,6}, {4,3,3,3,4,4,3,3,4,5,5,6,5,6},
    {5,3,4,4,3,3,3,4,3,4,5,5,5}, {4,4,4,3,3,3,3,3,4,5,4,5}, {6,5,3,3,3,3,3,3,4,3,6}, {6,5,3,3,3,2,3,4,3,6},
    {6,4,5,3,2,2,3,3,6}, {6,6,4,2,2,3,2,5}, {5,5,3,2,2,2,4}, {4,4,3,3,1,3}, {4,4,2,1,3}, {3,3,1,2}, {2,2,1}, {1,1},
};
TABLE u8 ZEROS_BITS[15][16] = {
    {1,3,2,3,2,3,2,3,2,3,2,3,2,3,2,1}, {7,6,5,4,3,5,4,3,2,3,2,3,2,1,0}, {5,7,6,5,4,3,4,3,2,3,2,1,1,0},
    {3,7,5,4,6,5,4,3,3,2,2,1,0}, {5,4,3,7,6,5,4,3,2,1,1,0}, {1,1,7,6,5,4,3,2,1,1,0}, {1,1,5,4,3,3,2,1,1,0},
    {1,1,1,3,3,2,2,1,0}, {1,0,1,3,2,1,1,1}, {1,0,1,3,2,1,1}, {0,1,1,2,1,3}, {0,1,1,1,1}, {0,1,1,1}, {0,1,1}, {0,1},
};
TABLE u8 CHROMA_ZEROS_LENGTH[3][4] = {{1,2,3,3}, {1,2,2}, {1,1}};
TABLE u8 CHROMA_ZEROS_BITS[3][4] = {{1,1,1,0}, {1,1,0}, {1,0}};
TABLE u8 RUN_LENGTH[7][16] = {
    {1,1}, {1,2,2}, {2,2,2,2}, {2,2,2,3,3}, {2,2,3,3,3,3}, {2,3,3,3,3,3,3}, {3,3,3,3,3,3,3,4,5,6,7,8,9,10,11},
};
TABLE u8 RUN_BITS[7][16] = {
    {1,0}, {1,1,0}, {3,2,1,0}, {3,2,1,1,0}, {3,2,3,2,1,0}, {3,0,1,3,2,5,4}, {7,6,5,4,3,2,1,1,1,1,1,1,1,1,1},
};
// Of a coefficient whose x and y are both even, both odd, and one of each, by QP % 6.
TABLE int QUANTISE[6][3] = {
    {13107, 5243, 8066}, {11916, 4660, 7490}, {10082, 4194, 6554},
    {9362, 3647, 5825}, {8192, 3355, 5243}, {7282, 2893, 4559},
};
TABLE int RESCALE[6][3] = {{10, 16, 13}, {11, 18, 14}, {13, 20, 16}, {14, 23, 18}, {16, 25, 20}, {18, 29, 23}};
// Of QP 30…51.
TABLE u8 CHROMA_QP[22] = {29, 30, 31, 32, 32, 33, 34, 34, 35, 35, 36, 36, 37, 37, 37, 38, 38, 38, 39, 39, 39, 39};
TABLE u8 HADAMARD[4] = {0x0, 0xC, 0x6, 0xA};  // which of four terms are subtracted

// ---- Bits -----------------------------------------------------------------------------------------------------------

DEVICE int highest(u32 mask) {  // bit that is set, of one that is not 0
#ifdef __CUDACC__
    return 31 - __clz(mask);
#else
    return 31 - __builtin_clz(mask);
#endif
}

DEVICE int how_many(u32 mask) {
#ifdef __CUDACC__
    return __popc(mask);
#else
    return __builtin_popcount(mask);
#endif
}

struct Bits {  // the first one is the highest of the first word
    u32* words;
    u64 rest = 0;  // those that fill no word yet
    int count = 0;
};

DEVICE void put(Bits& bits, u32 value, int length) {  // length: up to 32
    const int full = (bits.count & 31) + length;
    bits.rest = bits.rest << length | value;
    if (full >= 32) bits.words[bits.count >> 5] = static_cast<u32>(bits.rest >> (full - 32));
    bits.count += length;
}

DEVICE void finish(Bits& bits) {
    if (bits.count & 31) bits.words[bits.count >> 5] = static_cast<u32>(bits.rest << (32 - (bits.count & 31)));
}

DEVICE void put_ue(Bits& bits, u32 value) {  // 9.1
    put(bits, value + 1, 2 * highest(value + 1) + 1);
}

DEVICE void put_se(Bits& bits, int value) { put_ue(bits, value > 0 ? 2 * value - 1 : -2 * value); }

// One block's levels, in the order of its scan: 7.3.5.3.2 and 9.2. many: how many it could hold, 16, 15 or 4. mask:
// which are not 0; large: which are over 1 and under -1. Lanes are fast where all do the same: so few branches.
DEVICE void put_levels(Bits& bits, const short* levels, int many, u32 mask, u32 large, int nC) {
    const int total = how_many(mask);
    const u32 behind_large = large ? mask & ~((2u << highest(large)) - 1) : mask;
    const int ones = how_many(behind_large) < 3 ? how_many(behind_large) : 3, token = total * 4 + ones;
    if (nC < 8) {
        const int table = nC < 0 ? 3 : nC < 2 ? 0 : nC < 4 ? 1 : 2;
        put(bits, TOKEN_BITS[table][token], TOKEN_LENGTH[table][token]);
    } else {
        put(bits, total == 0 ? 3 : token - 4, 6);
    }
    if (total == 0) return;
    int suffix = total > 10 && ones < 3;  // suffixLength
    u32 left = mask;
    for (int one = 0; left; ++one) {
        const int place = highest(left), level = levels[place], size = level < 0 ? -level : level;
        left ^= 1u << place;
        const int code = 2 * size - 2 + (level < 0) - (one == ones && ones < 3 ? 2 : 0);
        const int escape = suffix ? 15 << suffix : 30;
        u32 value = (1u << suffix) | (code & ((1 << suffix) - 1));
        int length = (code >> suffix) + 1 + suffix;
        if (suffix == 0 && code >= 14) value = 16 + code - 14, length = 19;
        if (code >= escape) value = 4096 + code - escape, length = 28;
        if (one < ones) value = level < 0, length = 1;
        put(bits, value, length);
        if (one >= ones) {
            suffix += suffix == 0;
            suffix += size > 3 << (suffix - 1) && suffix < 6;
        }
    }
    int zeros = highest(mask) + 1 - total;
    if (total < many) {
        if (many == 4) put(bits, CHROMA_ZEROS_BITS[total - 1][zeros], CHROMA_ZEROS_LENGTH[total - 1][zeros]);
        else put(bits, ZEROS_BITS[total - 1][zeros], ZEROS_LENGTH[total - 1][zeros]);
    }
    left = mask;
    while (zeros > 0) {
        const int place = highest(left);
        left ^= 1u << place;
        if (!left) break;
        const int run = place - highest(left) - 1, table = (zeros < 7 ? zeros : 7) - 1;
        put(bits, RUN_BITS[table][run], RUN_LENGTH[table][run]);
        zeros -= run;
    }
}

// ---- One macroblock -------------------------------------------------------------------------------------------------

struct Row {  // what a warp shares; the row's own bits lie behind it
    u8 left[32];                   // the column to the left, as decoded: 16 of Y, 8 of Cb, 8 of Cr
    u8 samples[BLOCKS][20];        // of the picture, 16 a block; 20: see STRIDE
    short levels[BLOCKS][STRIDE];  // first coefficients, then levels in the order of the scan
    int dc[BLOCKS];                // DC coefficients of the blocks, then as a decoder has them
    short dc_levels[BLOCKS];       // in raster order within Y, Cb, Cr
    int errors[BLOCKS][4];         // squared changes; absolute differences, by DC and horizontally; Coded's detail
    int means[BLOCKS];             // what DC prediction makes of the left column
    u32 masks[BLOCKS];             // of AC levels that are not 0, by their place in the scan less one
    u32 large[BLOCKS];             // of those that are over 1 and under -1
    int totals[BLOCKS];            // TotalCoeff
    int left_totals[8];            // of the blocks to the left: 4 of Y, 2 of Cb, 2 of Cr
    int lengths[32];               // of the pieces, bits
    u32 pieces[PIECES][PIECE_WORDS];
};

static_assert(sizeof(Row) <= 4608, "as much has h264_coder.py ask for");

struct Block {  // where a 4x4 block lies: in which plane, and where in its macroblock, in blocks
    int plane, x, y;
};

DEVICE Block block_at(int number) {
    if (number >= LUMA) return {number < 20 ? 1 : 2, number & 1, (number >> 1) & 1};
    return {0, (number & 1) + ((number >> 1) & 2), ((number >> 1) & 1) + ((number >> 2) & 2)};
}

DEVICE int luma_number(int x, int y) { return (x & 1) + 2 * (y & 1) + 4 * (x >> 1) + 8 * (y >> 1); }

DEVICE int clamp(int value, int most) { return value < 0 ? 0 : value > most ? most : value; }

DEVICE int distance(int one, int other) { return one < other ? other - one : one - other; }

// Rows and columns of a 4x4 Hadamard transform of what is in raster order: the coefficient at `place`.
template <typename Term>
DEVICE int hadamard(const Term* terms, int place) {
    const u8 down = HADAMARD[place >> 2], across = HADAMARD[place & 3];
    int sum = 0;
    UNROLLED for (int term = 0; term < 16; ++term)
        sum += ((down >> (term >> 2)) ^ (across >> (term & 3))) & 1 ? -terms[term] : terms[term];
    return sum;
}

template <typename Term>
DEVICE int hadamard_2(const Term* terms, int place) {  // the same of 2x2
    const int top = place & 1 ? terms[0] - terms[1] : terms[0] + terms[1];
    const int bottom = place & 1 ? terms[2] - terms[3] : terms[2] + terms[3];
    return place & 2 ? top - bottom : top + bottom;
}

DEVICE constexpr int zigzag(int scan) {  // the place y * 4 + x: four bits of a number, and no memory is asked
    return 0xFEB7ADC963258410ull >> (4 * scan) & 15;
}

DEVICE constexpr int kind_of(int place) {  // of QUANTISE and RESCALE
    return (place & 1) != ((place >> 2) & 1) ? 2 : place & 1;
}

struct Scale {  // of a QP
    int shift, third;  // a third of a step is added before a level is cut off: rounding would add a half
    int quantise[3];
    int rescale[3];    // with the power of 2 of the QP
};

DEVICE Scale scale_of(int qp) {
    Scale scale = {15 + qp / 6, (1 << (15 + qp / 6)) / 3, {}, {}};
    for (int kind = 0; kind < 3; ++kind) {
        scale.quantise[kind] = QUANTISE[qp % 6][kind];
        scale.rescale[kind] = RESCALE[qp % 6][kind] << (qp / 6);
    }
    return scale;
}

DEVICE int quantised(int coefficient, const Scale& scale, int kind) {
    const int size = coefficient < 0 ? -coefficient : coefficient;
    const int level = (size * scale.quantise[kind] + scale.third) >> scale.shift;
    return coefficient < 0 ? -level : level;
}

DEVICE int quantised_dc(int coefficient, const Scale& scale) {  // which went through two transforms
    const int size = coefficient < 0 ? -coefficient : coefficient;
    const int level = (size * scale.quantise[0] + 2 * scale.third) >> (scale.shift + 1);
    return coefficient < 0 ? -level : level;
}

DEVICE void transform(const int* residual, int* out) {  // 8.5.10's, the other way
    int half[16];
    for (int row = 0; row < 4; ++row) {
        const int* r = residual + 4 * row;
        const int a = r[0] + r[3], b = r[1] + r[2], c = r[1] - r[2], d = r[0] - r[3];
        half[4 * row] = a + b, half[4 * row + 1] = 2 * d + c, half[4 * row + 2] = a - b, half[4 * row + 3] = d - 2 * c;
    }
    for (int column = 0; column < 4; ++column) {
        const int* h = half + column;
        const int a = h[0] + h[12], b = h[4] + h[8], c = h[4] - h[8], d = h[0] - h[12];
        out[column] = a + b, out[column + 4] = 2 * d + c, out[column + 8] = a - b, out[column + 12] = d - 2 * c;
    }
}

DEVICE void last_column(const int* c, int* out) {  // of the inverse transform: 8.5.12.2
    int ends[4];
    for (int row = 0; row < 4; ++row) {
        const int* r = c + 4 * row;
        ends[row] = r[0] + r[2] - (r[1] + (r[3] >> 1));
    }
    const int e = ends[0] + ends[2], f = ends[0] - ends[2], g = (ends[1] >> 1) - ends[3], h = ends[1] + (ends[3] >> 1);
    out[0] = e + h, out[1] = f + g, out[2] = f - g, out[3] = e - h;
}

// ---- A row ----------------------------------------------------------------------------------------------------------

struct Picture {  // as Python lays it out: what is coded of a batch's picture
    const u8* planes;  // (height * 3 / 2, width)
    u8* coded;         // of the same size: each macroblock as it was when it was last coded; null: all is coded
    int qp;
    int frame_num;     // 0…15 since the last IDR picture, which is 0
    int idr_pic_id;    // differs between two that follow each other
    int is_first;      // an IDR picture
    int refreshed;     // rows of this number, modulo REFRESH, are coded anew: deblocking wears what is skipped for long
};

struct Shape {
    int width, height;  // of the planes, even
    int columns, rows;  // of macroblocks
    int row_bytes;      // room for the bytes of a row
};

struct Coded {  // a row, or a picture
    int bytes;
    int detail;  // by how much luma samples differ from those beside and above them within 4x4 blocks, summed
};

struct Place {  // of a plane in planes: its first sample, and its size
    int first, width, height;
};

DEVICE Place place_of(const Shape& shape, int plane) {
    const int luma = shape.width * shape.height;
    if (plane == 0) return {0, shape.width, shape.height};
    return {plane == 1 ? luma : luma + luma / 4, shape.width / 2, shape.height / 2};
}

struct Samples {  // where those of a block lie in planes; beyond the edge it goes on as it ends
    int first[4];   // of its rows
    int column[4];
};

DEVICE int place_in(const Samples& at, int place) { return at.first[place >> 2] + at.column[place & 3]; }

DEVICE Samples samples_of(const Shape& shape, const Block& block, int column, int row) {
    const Place place = place_of(shape, block.plane);
    const int side = block.plane ? 8 : 16;
    Samples at;
    UNROLLED for (int one = 0; one < 4; ++one) {
        at.first[one] = place.first + clamp(row * side + 4 * block.y + one, place.height - 1) * place.width;
        at.column[one] = clamp(column * side + 4 * block.x + one, place.width - 1);
    }
    return at;
}

DEVICE int left_place(const Block& block, int y) { return (block.plane ? 8 + 8 * block.plane : 0) + 4 * block.y + y; }

DEVICE int left_sample(const Row& s, const Block& block, int y) { return s.left[left_place(block, y)]; }

DEVICE int left_mean(const Row& s, const Block& block, bool has_left) {  // 8.3.3.3, 8.3.4 without a row above
    if (!has_left) return 128;
    int sum = 0;
    if (block.plane == 0) {
        for (int y = 0; y < 16; ++y) sum += s.left[y];
        return (sum + 8) >> 4;
    }
    for (int y = 0; y < 4; ++y) sum += left_sample(s, block, y);
    return (sum + 2) >> 2;
}

DEVICE int predicted_nC(const Row& s, int number, bool has_neighbour) {  // 9.2.1
    const Block block = block_at(number);
    int left = -1, above = -1;
    if (block.plane == 0) {
        if (block.x) left = s.totals[luma_number(block.x - 1, block.y)];
        else if (has_neighbour) left = s.left_totals[block.y];
        if (block.y) above = s.totals[luma_number(block.x, block.y - 1)];
    } else {
        if (block.x) left = s.totals[number - 1];
        else if (has_neighbour) left = s.left_totals[2 + 2 * block.plane + block.y];
        if (block.y) above = s.totals[number - 2];
    }
    if (left >= 0 && above >= 0) return (left + above + 1) >> 1;
    return left >= 0 ? left : above >= 0 ? above : 0;
}

DEVICE void put_header(Bits& bits, const Picture& picture, const Shape& shape, int row) {  // 7.3.3
    put_ue(bits, row * shape.columns);          // first_mb_in_slice
    put_ue(bits, picture.is_first ? 7 : 5);     // slice_type: I or P, as all of the picture
    put_ue(bits, 0);                            // pic_parameter_set_id
    put(bits, picture.frame_num, 4);
    if (picture.is_first) {
        put_ue(bits, picture.idr_pic_id);
        put(bits, 0, 2);                        // no_output_of_prior_pics_flag, long_term_reference_flag
    } else {
        put(bits, 0, 3);  // num_ref_idx_active_override_flag, ref_pic_list_modification_flag_l0, adaptive_ref_pic_…
    }
    put_se(bits, picture.qp - 26);              // slice_qp_delta
}

// Bits behind others: lanes may do so side by side, for those of a word that two share are 0 in each.
DEVICE void append(u32* words, int first, const u32* piece, int count) {
    const int shift = first & 31;
    u32* to = words + (first >> 5);
    for (int word = 0; word < (count + 31) >> 5; ++word) {
        OR_WORD(to + word, piece[word] >> shift);
        if (shift) OR_WORD(to + word + 1, piece[word] << (32 - shift));
    }
}

// A row's bits as bytes, behind a start code and the NAL unit's header. Returns: how many.
DEVICE int put_out(u8* out, const u32* words, int bytes, bool is_first, int row) {
    int length = 0, zeros = 0;
    if (row == 0) out[length++] = 0;  // zero_byte, of an access unit's first (B.1.2)
    out[length++] = 0, out[length++] = 0, out[length++] = 1;
    out[length++] = is_first ? 0x65 : 0x41;
    for (int byte = 0; byte < bytes; ++byte) {
        const u8 value = words[byte >> 2] >> (24 - 8 * (byte & 3));
        if (zeros == 2 && value <= 3) out[length++] = 3, zeros = 0;  // emulation_prevention_three_byte
        out[length++] = value;
        zeros = value ? 0 : zeros + 1;
    }
    return length;
}

DEVICE void code_row(Row& s, u32* words, const Picture& picture, const Shape& shape, int row, u8* out, Coded* coded) {
    const bool is_refreshed = picture.is_first || row % REFRESH == picture.refreshed;
    const int most_bits = 8 * shape.row_bytes - 64;
    const Scale luma_scale = scale_of(picture.qp);
    const Scale chroma_scale = scale_of(picture.qp < 30 ? picture.qp : CHROMA_QP[picture.qp - 30]);
    int count = 0, skipped = 0, row_detail = 0;  // bits, macroblocks since the last one that was coded, see Coded
    bool has_left = false;                       // whose samples may be used
    FOR_LANES
        for (int word = lane; word < shape.row_bytes / 4; word += 32) words[word] = 0;
        if (lane < 8) s.left_totals[lane] = 0;
    END_LANES
    FOR_LANES
        if (lane == 0) {
            Bits first = {words};
            put_header(first, picture, shape, row);
            finish(first);
            s.lengths[0] = first.count;
        }
    END_LANES
    count = s.lengths[0];
    for (int column = 0; column < shape.columns; ++column) {
        const bool has_neighbour = column > 0;
        FOR_LANES  // the samples, and how well they are predicted
            if (lane < BLOCKS) {
                const Block block = block_at(lane);
                const Samples at = samples_of(shape, block, column, row);
                const int mean = left_mean(s, block, has_left);
                int changes = 0, by_mean = 0, by_left = 0, detail = 0;
                int samples[16];
                UNROLLED for (int place = 0; place < 16; ++place)
                    samples[place] = picture.planes[place_in(at, place)];
                if (!picture.is_first) {
                    UNROLLED for (int place = 0; place < 16; ++place) {
                        const int change = samples[place] - picture.coded[place_in(at, place)];
                        changes += change * change;
                    }
                }
                UNROLLED for (int place = 0; place < 16; ++place) {
                    s.samples[lane][place] = samples[place];
                    by_mean += distance(samples[place], mean);
                    by_left += distance(samples[place], left_sample(s, block, place >> 2));
                    if (place & 3) detail += distance(samples[place], samples[place - 1]);
                    if (place >> 2) detail += distance(samples[place], samples[place - 4]);
                }
                s.means[lane] = mean;
                s.errors[lane][0] = changes, s.errors[lane][1] = by_mean, s.errors[lane][2] = by_left;
                s.errors[lane][3] = block.plane ? 0 : detail;
            }
        END_LANES
        int changes = 0, luma_gain = 0, chroma_gain = 0;
        UNROLLED for (int block = 0; block < BLOCKS; ++block) {
            changes += s.errors[block][0];
            (block < LUMA ? luma_gain : chroma_gain) += s.errors[block][1] - s.errors[block][2];
            row_detail += s.errors[block][3];
        }
        if (!is_refreshed && changes <= SKIP_ERROR) {
            ++skipped;
            has_left = false;
            FOR_LANES
                if (lane < 8) s.left_totals[lane] = 0;
            END_LANES
            continue;
        }
        const bool luma_left = has_left && luma_gain > 0, chroma_left = has_left && chroma_gain > 0;
        FOR_LANES  // what is left of them, transformed
            if (lane < BLOCKS) {
                const Block block = block_at(lane);
                const bool from_left = block.plane ? chroma_left : luma_left;
                int residual[16], coefficients[16];
                UNROLLED for (int place = 0; place < 16; ++place) {
                    const int predicted = from_left ? left_sample(s, block, place >> 2) : s.means[lane];
                    residual[place] = s.samples[lane][place] - predicted;
                }
                if (picture.coded) {
                    const Samples at = samples_of(shape, block, column, row);
                    UNROLLED for (int place = 0; place < 16; ++place)
                        picture.coded[place_in(at, place)] = s.samples[lane][place];
                }
                transform(residual, coefficients);
                s.dc[block.plane ? lane : 4 * block.y + block.x] = coefficients[0];
                const Scale& scale = block.plane ? chroma_scale : luma_scale;
                u32 mask = 0, large = 0;
                UNROLLED for (int scan = 1; scan < 16; ++scan) {
                    const int level = quantised(coefficients[zigzag(scan)], scale, kind_of(zigzag(scan)));
                    s.levels[lane][scan] = level;
                    mask |= (level != 0) << (scan - 1);
                    large |= (level > 1 || level < -1) << (scan - 1);
                }
                s.masks[lane] = mask, s.large[lane] = large, s.totals[lane] = how_many(mask);
            }
        END_LANES
        FOR_LANES
            if (lane < LUMA) {
                s.dc_levels[lane] = quantised_dc((hadamard(s.dc, lane) + 1) >> 1, luma_scale);
            } else if (lane < BLOCKS) {
                s.dc_levels[lane] = quantised_dc(hadamard_2(s.dc + (lane & ~3), lane & 3), chroma_scale);
            }
        END_LANES
        // A row that has no room left goes on without residuals: worse for the rest of it, and right again in the next.
        const int needed = 8 * (MOST_MACROBLOCK + LEAST_MACROBLOCK * (shape.columns - column));
        const bool is_full = count + needed > most_bits;
        int luma_ac = 0, chroma = 0;
        UNROLLED for (int block = 0; block < BLOCKS; ++block) {
            if (block < LUMA) luma_ac |= s.totals[block];
            else chroma |= (s.totals[block] ? 2 : 0) | (s.dc_levels[block] ? 1 : 0);
        }
        const int chroma_pattern = is_full ? 0 : chroma & 2 ? 2 : chroma;
        const bool has_luma = !is_full && luma_ac;
        WAIT_FOR_LANES;  // all have read what the next step clears
        FOR_LANES
            if (lane < BLOCKS && !(lane < LUMA ? has_luma : chroma_pattern == 2)) {
                s.masks[lane] = s.large[lane] = s.totals[lane] = 0;
                UNROLLED for (int scan = 1; scan < 16; ++scan) s.levels[lane][scan] = 0;
            }
            if (lane < BLOCKS && is_full) s.dc_levels[lane] = 0;
            if (lane < BLOCKS && is_full && picture.coded) {  // far from what it is, so that the next picture codes it
                const Samples at = samples_of(shape, block_at(lane), column, row);
                UNROLLED for (int place = 0; place < 16; ++place)
                    picture.coded[place_in(at, place)] = s.samples[lane][place] ^ 0x80;
            }
        END_LANES
        FOR_LANES  // 8.5.10, 8.5.11.2: what a decoder makes of the DC levels
            if (lane < LUMA) {
                const int scaled = hadamard(s.dc_levels, lane) * luma_scale.rescale[0];
                s.dc[lane] = (scaled + 2) >> 2;
            } else if (lane < BLOCKS) {
                s.dc[lane] = hadamard_2(s.dc_levels + (lane & ~3), lane & 3) * chroma_scale.rescale[0] >> 1;
            }
        END_LANES
        FOR_LANES  // bits, each lane those of a piece
            Bits piece = {s.pieces[lane < PIECES ? lane : 0]};
            const short* levels = nullptr;
            short by_scan[16];
            int many = 15, nC = -1;
            u32 mask = 0, large = 0;
            if (lane == 0) {
                if (!picture.is_first) put_ue(piece, skipped);
                const int mode = luma_left ? 1 : 2;
                const int type = 1 + mode + 4 * chroma_pattern + (has_luma ? 12 : 0);
                put_ue(piece, picture.is_first ? type : 5 + type);  // mb_type
                put_ue(piece, chroma_left ? 1 : 0);                 // intra_chroma_pred_mode
                put_se(piece, 0);                                   // mb_qp_delta
            } else if (lane == 1 || lane == 18 || lane == 19) {
                many = lane == 1 ? 16 : 4;
                levels = by_scan;
                UNROLLED for (int scan = 0; scan < 16; ++scan) {
                    const int level = lane == 1 ? s.dc_levels[zigzag(scan)]
                                      : scan < 4 ? s.dc_levels[LUMA + 4 * (lane - 18) + (scan & 3)] : 0;
                    by_scan[scan] = level;
                    mask |= (level != 0) << scan;
                    large |= (level > 1 || level < -1) << scan;
                }
                if (lane == 1) nC = predicted_nC(s, 0, has_neighbour);
                else if (!chroma_pattern) levels = nullptr;
            } else if (lane < PIECES && (lane < 18 ? has_luma : chroma_pattern == 2)) {
                const int number = lane < 18 ? lane - 2 : lane - 4;
                levels = s.levels[number] + 1, mask = s.masks[number], large = s.large[number];
                nC = predicted_nC(s, number, has_neighbour);
            }
            if (levels) put_levels(piece, levels, many, mask, large, nC);
            finish(piece);
            s.lengths[lane] = piece.count;
        END_LANES
        FOR_LANES
            int first = count;
            UNROLLED for (int piece = 0; piece < PIECES; ++piece) first += piece < lane ? s.lengths[piece] : 0;
            if (lane < PIECES) append(words, first, s.pieces[lane], s.lengths[lane]);
            const Block block = block_at(lane < BLOCKS ? lane : 0);
            if (lane < BLOCKS && block.x == (block.plane ? 1 : 3)) {  // what the next macroblock is predicted from
                const Scale& scale = block.plane ? chroma_scale : luma_scale;
                int coefficients[16], column_of[4];
                coefficients[0] = s.dc[block.plane ? lane : 4 * block.y + block.x];
                UNROLLED for (int scan = 1; scan < 16; ++scan)
                    coefficients[zigzag(scan)] = s.levels[lane][scan] * scale.rescale[kind_of(zigzag(scan))];
                last_column(coefficients, column_of);
                const bool from_left = block.plane ? chroma_left : luma_left;
                UNROLLED for (int y = 0; y < 4; ++y) {
                    const int predicted = from_left ? left_sample(s, block, y) : s.means[lane];
                    s.samples[lane][y] = clamp(predicted + ((column_of[y] + 32) >> 6), 255);
                }
            }
        END_LANES
        UNROLLED for (int piece = 0; piece < PIECES; ++piece) count += s.lengths[piece];
        FOR_LANES
            const Block block = block_at(lane < BLOCKS ? lane : 0);
            if (lane < BLOCKS && block.x == (block.plane ? 1 : 3)) {
                UNROLLED for (int y = 0; y < 4; ++y) s.left[left_place(block, y)] = s.samples[lane][y];
                s.left_totals[(block.plane ? 2 + 2 * block.plane : 0) + block.y] = s.totals[lane];
            }
        END_LANES
        skipped = 0;
        has_left = true;
    }
    FOR_LANES
        if (lane == 0) {
            Bits tail = {s.pieces[0]};
            if (skipped) put_ue(tail, skipped);
            put(tail, 1, 1);  // rbsp_stop_one_bit
            finish(tail);
            append(words, count, s.pieces[0], tail.count);
            *coded = {put_out(out, words, (count + tail.count + 7) >> 3, picture.is_first, row), row_detail};
        }
    END_LANES
}

DEVICE Shape shape_of(int width, int height, int row_bytes) {
    return {width, height, (width + 15) / 16, (height + 15) / 16, row_bytes};
}

DEVICE int room_of(int row_bytes) { return row_bytes * 3 / 2 + 8; }  // with all that emulation prevention may add

#ifdef __CUDACC__
// Grid: (rows, pictures), 32 threads. rows: (pictures, rows, room_of) bytes; coded: (pictures, rows).
KERNEL void code_rows(const Picture* pictures, u8* rows, Coded* coded, int width, int height, int row_bytes) {
    extern __shared__ u32 memory[];
    Row& s = *reinterpret_cast<Row*>(memory);
    const Shape shape = shape_of(width, height, row_bytes);
    const int row = blockIdx.x, place = blockIdx.y * shape.rows + row;
    u32* words = memory + (sizeof(Row) + 3) / 4;
    u8* out = rows + (long long)place * room_of(row_bytes);
    const Picture picture = pictures[blockIdx.y];  // once: it lies in the host's memory
    code_row(s, words, picture, shape, row, out, coded + place);
}

// Grid: pictures, 256 threads. whole: (pictures,), and joined: (pictures, rows * room_of) bytes, in the host's memory.
KERNEL void join_rows(const u8* rows, const Coded* coded, Coded* whole, u8* joined, int width, int height,
                      int row_bytes) {
    const int count = shape_of(width, height, row_bytes).rows, room = room_of(row_bytes), picture = blockIdx.x;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    Coded sum = {0, 0};
    for (int row = 0; row < count; ++row) {
        const Coded one = coded[picture * count + row];
        if (row % warps == warp) {
            const u8* from = rows + (long long)(picture * count + row) * room;
            u8* to = joined + (long long)picture * count * room + sum.bytes;
            for (int byte = lane; byte < one.bytes; byte += 32) to[byte] = from[byte];
        }
        sum = {sum.bytes + one.bytes, sum.detail + one.detail};
    }
    if (threadIdx.x == 0) whole[picture] = sum;
}
#else
// A whole picture, its rows one after the other. words: room for the bits of one.
KERNEL void code_picture(const Picture* picture, u32* words, Coded* whole, u8* out, int width, int height,
                         int row_bytes) {
    Row s;
    const Shape shape = shape_of(width, height, row_bytes);
    *whole = {0, 0};
    for (int row = 0; row < shape.rows; ++row) {
        Coded coded;
        code_row(s, words, *picture, shape, row, out + whole->bytes, &coded);
        *whole = {whole->bytes + coded.bytes, whole->detail + coded.detail};
    }
}
#endif
