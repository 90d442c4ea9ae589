// Numbers that kernels and the code that launches them share, written once: build.rs makes Rust constants of them. It reads
// `constexpr int NAME = number, ...;` and tables `constexpr int NAME[][N] = {{...}, ...};`, and nothing else may stand here.
#pragma once

// Threads of a block where a kernel does not say otherwise.
constexpr int PLAIN_THREADS = 256;

// Numbers of activations (activation.cuh), and of the other functions of elementwise.cu.
constexpr int NONE = 0, SILU = 1, GELU = 2, QUICK_GELU = 3, GELU_TANH = 4, GEGLU = 5;
constexpr int AFFINE = 16, CLAMP = 17, SQRT = 18, SQUARE = 19, LN = 20, EXP = 21, RECIPROCAL = 22, SPHERICAL = 23;
constexpr int ADD = 32, MUL = 33;

// Of one launch: channels of channel_affine and parts of strided_sum (elementwise.cu), terms of combine (update.cu).
constexpr int MOST_CHANNELS = 16, MOST_PARTS = 8, MOST_TERMS = 8;

// Rows (rows.cuh): vectors of a row that a thread keeps, threads of a block at most, threads of a block that adds up columns.
constexpr int HELD = 5, TEAM = 512, COLUMN_THREADS = 256;

// Group norm (group_norm.cu): threads of a block, and parts of groups at most.
constexpr int GROUP_THREADS = 256, PARTS = 64;

// Targets of a block of resize_tables (resample.cu).
constexpr int TABLE_THREADS = 128;

// Products (gemm_mainloop.cuh): stages of the ring, bytes of each row and column in one.
constexpr int STAGES = 3, STAGE_DEPTH_BYTES = 64;
// Their tiles: rows and columns, warps down, warps across.
constexpr int GEMM_TILES[][3] = {{64, 2, 2}, {128, 2, 4}};

// Boxes on Hopper (sm90.cuh): bytes of a line.
constexpr int LINE_BYTES = 128;
// Products there (sm90_gemm.cu): rows of a tile, threads of a block.
constexpr int SM90_ROWS = 128, SM90_THREADS = 288;

// Attention (attention_forward.cu) in 16 bits and in f32, by head dimension: warps down, across, keys of a tile, slots of the ring.
constexpr int FORWARD_HALF[][5] = {
    {16, 4, 1, 64, 3}, {32, 4, 1, 64, 3},  {48, 4, 1, 64, 3},  {64, 4, 1, 64, 3},
    {80, 4, 1, 32, 3}, {128, 4, 1, 32, 3}, {160, 4, 1, 32, 3}, {512, 2, 2, 32, 2},
};
constexpr int FORWARD_SINGLE[][5] = {
    {16, 4, 1, 32, 3}, {32, 4, 1, 32, 3},  {48, 4, 1, 32, 3},  {64, 4, 1, 32, 3},
    {80, 4, 1, 32, 3}, {128, 4, 1, 16, 3}, {160, 4, 1, 16, 3}, {512, 1, 4, 16, 2},
};
// On Hopper (sm90_attention.cu): keys of a tile by head dimension; queries and threads of a block, slots of keys and values.
constexpr int FORWARD_SM90[][2] = {{40, 128}, {64, 128}, {80, 128}, {128, 128}, {160, 64}};
constexpr int SM90_QUERIES = 128, SM90_ATTENTION_THREADS = 384, SM90_SLOTS = 2;
// Its gradient (attention_backward.cu), by head dimension: a block's own rows, rows of a tile that passes, warps across. Larger
// heads are streamed, so many columns at a time.
constexpr int BACKWARD_HALF[][4] = {
    {16, 64, 32, 1}, {32, 64, 32, 1}, {48, 64, 32, 1}, {64, 64, 32, 1}, {80, 64, 32, 1}, {128, 64, 32, 2}, {160, 64, 32, 2},
};
constexpr int BACKWARD_SINGLE[][4] = {
    {16, 64, 16, 1}, {32, 64, 16, 1}, {48, 64, 16, 1}, {64, 64, 16, 1}, {80, 64, 16, 1},
};
constexpr int STREAMED_OWN = 32, STREAMED_OTHER = 64, STREAMED_COLUMNS = 128, STREAMED_THREADS = 256;
// Queries and heads of a block of attention_delta, eight threads each.
constexpr int DELTA_ROWS = 32;
