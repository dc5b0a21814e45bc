// The product of 8-bit weights and 8-bit activations, both with scales, on Hopper (compute capability 9.0).
//
// A program computes OUTPUTS outputs of ROWS rows of x; of a gated product half of them are gates, and half as many
// results are written. One warp copies boxes of both operands, 128 columns wide, to
// shared memory, where two warpgroups multiply them: of up to 64 rows each has half of the outputs, of more each has
// half of the rows. Programs that share the columns are a cluster, and add their sums up through each other's shared
// memory, always in the same order. Others take one tile after the other, and the copies of the next begin while results
// are written.
//
// Tensor cores add e4m3 products up with few bits, so the sums of 128 columns are added in float32.
//
// hopper.cuh stands before it. The source is compiled with these macros:
//   ROWS          rows of x: 64, 128 or 256
//   OUTPUTS       a multiple of 16; of 32 where ROWS is 64
//   IS_INT        operands are int8 rather than e4m3
//   BF16          results, if they are not float32, and biases are bfloat16 rather than float16
//   X_BLOCKS      x has a scale for each 128 columns of a row
//   WEIGHT_BLOCKS weights have a scale for 128 x 128
//   STAGES        copies that can be under way

#if IS_INT
typedef int Sum;
#else
typedef float Sum;
#endif

constexpr int X_BYTES = ROWS * 128;
constexpr int SLOT = X_BYTES + OUTPUTS * 128;
constexpr int BARRIERS_AT = STAGES * SLOT;
constexpr int HALVES = ROWS == 256 ? 2 : 1;             // of a warpgroup's rows, 64 each
constexpr int WIDTH = ROWS == 64 ? OUTPUTS / 2 : OUTPUTS;  // outputs of a warpgroup
constexpr int NUM_SUMS = WIDTH / 2;                     // of a thread and 64 rows
constexpr int PITCH = OUTPUTS + 4;                      // numbers from one row of sums to the next
constexpr int CONSUMERS = 8;                            // warps
constexpr int BATCH = 2;                                // pairs of columns that are written at once

WGMMA

// Arguments beside the tensors' maps.
struct Arguments {
  const float* x_scales;
  const float* weight_scales;
  const void* bias;       // or null
  void* out;
  long long out_stride;
  int num_rows;           // of x
  int num_outputs;        // of the product, or of each half of a gated one
  int num_blocks;         // of 128 columns
  int split_blocks;       // of a program
  int num_splits;         // programs that share the columns
  int row_tiles;
  int num_tiles;
  int x_box_bytes;
  int x_scale_stride;     // 0: one scale is for all
  int weight_scale_stride;
  int is_gated;           // silu of the first num_outputs times the rest is written
  int adds;               // the product is added to what `out` holds
  int is_wide;            // `out` is float32
  int is_even;            // results beside each other can be written at once
};

// Keeps reads of sums behind the wait for the products that write them.
static __device__ __forceinline__ void settle(Sum (&sums)[NUM_SUMS]) {
#pragma unroll
  for (int i = 0; i < NUM_SUMS; ++i)
#if IS_INT
    asm volatile("" : "+r"(sums[i])::"memory");
#else
    asm volatile("" : "+f"(sums[i])::"memory");
#endif
}

// Where a program is, and what it computes.
struct Place {
  const Arguments& arguments;
  u32 base;
  int split, first_block, end_block;

  __device__ __forceinline__ Place(const Arguments& arguments, u32 base) : arguments(arguments), base(base) {
    split = blockIdx.x % arguments.num_splits;
    first_block = split * arguments.split_blocks;
    end_block = min(first_block + arguments.split_blocks, arguments.num_blocks);
  }

  __device__ __forceinline__ int first_tile() const { return blockIdx.x / arguments.num_splits; }
  __device__ __forceinline__ int tile_step() const { return gridDim.x / arguments.num_splits; }
  // Tiles of the same outputs follow each other, so that weights are read from memory once.
  __device__ __forceinline__ int row(int tile) const { return tile % arguments.row_tiles * ROWS; }
  // The first result of a tile in its row.
  __device__ __forceinline__ int output(int tile) const {
    return tile / arguments.row_tiles * (OUTPUTS >> arguments.is_gated);
  }
  __device__ __forceinline__ u32 full(int slot) const { return base + BARRIERS_AT + 8 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return base + BARRIERS_AT + 8 * (STAGES + slot); }
};

// The copies of one thread, each into the next slot as soon as that is empty.
static __device__ __forceinline__ void copy_all(const Place& place, const TensorMap& x_map, const TensorMap& weight_map) {
  const Arguments& arguments = place.arguments;
  const u64 often = cache_policy_last(), once = arguments.row_tiles == 1 ? cache_policy_first() : often;
  Turn<STAGES> turn;

  auto copy_weights = [&](int slot, int tile, int block) {
    barrier_expect(place.full(slot), OUTPUTS * 128 + arguments.x_box_bytes);
    u32 target = place.base + slot * SLOT + X_BYTES;
    if (!arguments.is_gated) {
      copy_box(target, &weight_map, block * 128, place.output(tile), place.full(slot), once);
      return;
    }
    // A warpgroup has the gates of its results first, and then what they multiply.
#pragma unroll
    for (int i = 0; i < 2 * OUTPUTS / WIDTH; ++i) {
      const int row = place.output(tile) + i / 2 * (WIDTH / 2) + i % 2 * arguments.num_outputs;
      copy_box(target, &weight_map, block * 128, row, place.full(slot), once);
      target += WIDTH / 2 * 128;
    }
  };
  auto copy_x = [&](int slot, int tile, int block) {
    copy_box(place.base + slot * SLOT, &x_map, block * 128, place.row(tile), place.full(slot), often);
  };

  const int ahead = min(STAGES, place.end_block - place.first_block), first_tile = place.first_tile();
  for (int i = 0; i < ahead; ++i) copy_weights(i, first_tile, place.first_block + i);
  // What x holds comes from the kernels before; weights do not.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int i = 0; i < ahead; ++i) {
    copy_x(i, first_tile, place.first_block + i);
    turn.next();
  }
  for (int tile = first_tile; tile < arguments.num_tiles; tile += place.tile_step()) {
    for (int block = place.first_block + (tile == first_tile ? ahead : 0); block < place.end_block; ++block) {
      barrier_wait(place.empty(turn.slot), turn.parity ^ 1);
      copy_weights(turn.slot, tile, block);
      copy_x(turn.slot, tile, block);
      turn.next();
    }
  }
}

// A warpgroup's part of the products.
struct Consumer {
  const Place& place;
  int lane, warp_row, first_row, first_output;  // in the tile
  Turn<STAGES> turn;
  Sum sums[HALVES][NUM_SUMS];

  __device__ __forceinline__ Consumer(const Place& place, int warp, int lane) : place(place), lane(lane) {
    const int group = warp / 4;
    first_row = ROWS == 64 ? 0 : group * (ROWS / 2);
    first_output = ROWS == 64 ? group * WIDTH : 0;
    warp_row = warp % 4 * 16 + lane / 4;
  }

  __device__ __forceinline__ void release(int slot) const {
    if (lane == 0) barrier_arrive(place.empty(slot));
  }

  __device__ __forceinline__ void multiply_tile(int tile) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int i = 0; i < NUM_SUMS; ++i) sums[half][i] = 0;
    int before = -1;
    for (int block = place.first_block; block < place.end_block; ++block) {
#if X_BLOCKS || WEIGHT_BLOCKS
      float scales[HALVES][2][2];
      load_block_scales(scales, tile, block);
#endif
      barrier_wait(place.full(turn.slot), turn.parity);
      const u32 slot = place.base + turn.slot * SLOT;
      const u64 x = box_descriptor(slot + first_row * 128);
      const u64 weights = box_descriptor(slot + X_BYTES + first_output * 128);
#if IS_INT
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int step = 0; step < 4; ++step) multiply(sums[half], x + half * 512 + 2 * step, weights + 2 * step);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      // The products of the slot before this one are done.
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (before >= 0) release(before);
      before = turn.slot;
#else
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        Sum part[NUM_SUMS];
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        multiply_first(part, x + half * 512, weights);
#pragma unroll
        for (int step = 1; step < 4; ++step) multiply(part, x + half * 512 + 2 * step, weights + 2 * step);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
        settle(part);
        if (half == HALVES - 1) release(turn.slot);
#pragma unroll
        for (int i = 0; i < NUM_SUMS; ++i) {
#if X_BLOCKS || WEIGHT_BLOCKS
          sums[half][i] += part[i] * scales[half][i / 2 % 2][i / (NUM_SUMS / 2)];
#else
          sums[half][i] += part[i];
#endif
        }
      }
#endif
      turn.next();
    }
#if IS_INT
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int half = 0; half < HALVES; ++half) settle(sums[half]);
    if (before >= 0) release(before);
#endif
  }

#if X_BLOCKS || WEIGHT_BLOCKS
  // Of the thread's rows and the warpgroup's outputs, gates or all, and what gates multiply, each within one block of 128.
  __device__ __forceinline__ void load_block_scales(float (&scales)[HALVES][2][2], int tile, int block) const {
    const Arguments& arguments = place.arguments;
    float of_weights[2] = {1.0f, 1.0f};
#if WEIGHT_BLOCKS
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = place.output(tile) + (first_output >> arguments.is_gated) + i * arguments.is_gated * arguments.num_outputs;
      const int last = (arguments.num_outputs << arguments.is_gated) - 1;
      of_weights[i] = arguments.weight_scales[static_cast<long long>(min(row, last) / 128) * arguments.num_blocks + block];
    }
#endif
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float of_x = 1.0f;
#if X_BLOCKS
        const int row = min(place.row(tile) + first_row + half * 64 + warp_row + 8 * i, arguments.num_rows - 1);
        of_x = arguments.x_scales[static_cast<long long>(row) * arguments.num_blocks + block];
#endif
        scales[half][i][0] = of_x * of_weights[0];
        scales[half][i][1] = of_x * of_weights[1];
      }
  }
#endif

  // Results straight from registers: two of a row beside each other.
  __device__ __forceinline__ void write_tile(int tile) const {
    if (place.row(tile) + first_row + warp_row - lane / 4 >= place.arguments.num_rows) return;  // none of the warp's
    if (place.arguments.is_gated)
      write_results<true>(tile);
    else
      write_results<false>(tile);
  }

  template <bool GATED>
  __device__ __forceinline__ void write_results(int tile) const {
    const Arguments& arguments = place.arguments;
    const int top = place.row(tile) + first_row + warp_row;
    float x_scales[HALVES][2];
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i) x_scales[half][i] = x_scale(min(top + half * 64 + 8 * i, arguments.num_rows - 1));
    constexpr int PAIRS = GATED ? WIDTH / 16 : WIDTH / 8;
    const int first = place.output(tile) + (first_output >> GATED) + lane % 4 * 2;
    // What is added to is read for several columns at once, since the reads cannot pass the writes before them.
#pragma unroll
    for (int j = 0; j < PAIRS; j += BATCH) {
      float results[BATCH][HALVES][2][2];
#pragma unroll
      for (int b = 0; b < min(BATCH, PAIRS - j); ++b) {
        make_results<GATED>(results[b], j + b, first + (j + b) * 8, x_scales);
      }
#pragma unroll
      for (int pass = 0; pass < 2; ++pass) {
        if (pass == 0 && !arguments.adds) continue;
#pragma unroll
        for (int b = 0; b < min(BATCH, PAIRS - j); ++b)
#pragma unroll
          for (int half = 0; half < HALVES; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int row = top + half * 64 + 8 * i, column = first + (j + b) * 8;
              const int count = arguments.num_outputs - column;
              if (row >= arguments.num_rows || count <= 0) continue;
              const long long target = row * arguments.out_stride + column;
              float(&two)[2] = results[b][half][i];
              if (pass == 0)
                add_stored(two, arguments.out, target, arguments.is_wide, arguments.is_even, count);
              else
                store(two, arguments.out, target, arguments.is_wide, arguments.is_even, count);
            }
      }
    }
  }

  // Two results beside each other of each of the thread's rows; `j` counts the sums.
  template <bool GATED>
  __device__ __forceinline__ void make_results(float (&results)[HALVES][2][2], int j, int column,
                                               const float (&x_scales)[HALVES][2]) const {
    float factors[1 + GATED][2], biases[1 + GATED][2];
    const int num_outputs = place.arguments.num_outputs;
#pragma unroll
    for (int part = 0; part <= GATED; ++part)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        output_terms(factors[part][k], biases[part][k], min(column + k, num_outputs - 1) + part * num_outputs);
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int at = j * 4 + i * 2 + k;
          const float x = x_scales[half][i];
          float result = static_cast<float>(sums[half][at]) * factors[0][k] * x + biases[0][k];
          if (GATED) {
            const float up = static_cast<float>(sums[half][at + NUM_SUMS / 2]) * factors[GATED][k] * x;
            result = silu(result) * (up + biases[GATED][k]);
          }
          results[half][i][k] = result;
        }
  }

  // Sums to shared memory as [row][output], where the operands have been.
  __device__ __forceinline__ void stage_tile(unsigned char* shared) const {
    Sum* target = reinterpret_cast<Sum*>(shared);
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int i = 0; i < NUM_SUMS; ++i) {
        const int row = first_row + half * 64 + warp_row + i % 4 / 2 * 8;
        target[row * PITCH + first_output + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
      }
  }

  __device__ __forceinline__ float x_scale(int row) const {
    const Arguments& arguments = place.arguments;
    return X_BLOCKS ? 1.0f : arguments.x_scales[row * arguments.x_scale_stride];
  }

  // `output` is a row of the weights.
  __device__ __forceinline__ void output_terms(float& factor, float& bias, int output) const {
    const Arguments& arguments = place.arguments;
    factor = WEIGHT_BLOCKS ? 1.0f : __ldg(arguments.weight_scales + output * arguments.weight_scale_stride);
    bias = arguments.bias == nullptr ? 0.0f : constant_number(arguments.bias, output);
  }
};

// Where sums lie in a row of a tile: of a gated product, a warpgroup's gates come before what they multiply.
struct StagedAt {
  int is_gated;
  __device__ __forceinline__ int operator()(int output, int part) const {
    return is_gated ? output / (WIDTH / 2) * WIDTH + part * (WIDTH / 2) + output % (WIDTH / 2) : output;
  }
};

// What the sums of four outputs of a row are multiplied by, and what is added to them.
struct Terms {
  const Consumer& consumer;
  __device__ __forceinline__ void operator()(float (&sums)[4], int row, int output, int count) const {
    const float x = consumer.x_scale(row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float factor, bias;
      consumer.output_terms(factor, bias, output + min(i, count - 1));
      sums[i] = sums[i] * (factor * x) + bias;
    }
  }
};

// Grid: clusters of num_splits programs. With splits there is one for each tile, else as many as the
// device holds.
extern "C" __global__ void __launch_bounds__(384, 1)
hopper_scaled(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map,
              const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Place place(arguments, shared_address(shared));

  if (thread == 0) {
    for (int slot = 0; slot < STAGES; ++slot) {
      barrier_init(place.full(slot), 1);
      barrier_init(place.empty(slot), CONSUMERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  if (warp >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == CONSUMERS && lane == 0) copy_all(place, x_map, weight_map);
    __syncwarp();
    if (arguments.num_splits > 1) cluster_sync();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer consumer(place, warp, lane);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (arguments.num_splits > 1) {
      const int tile = place.first_tile();
      consumer.multiply_tile(tile);
      asm volatile("bar.sync 1, 256;" ::: "memory");
      consumer.stage_tile(shared);
      __syncwarp();
      cluster_sync();
      const Target target{arguments.out, arguments.out_stride, arguments.num_rows, arguments.num_outputs,
                          arguments.adds, arguments.is_wide, arguments.is_even, arguments.is_gated};
      const Staged<Sum> staged{place.base, PITCH, place.split, arguments.num_splits, ROWS / arguments.num_splits,
                               OUTPUTS >> arguments.is_gated};
      staged.write<4>(target, place.row(tile), place.output(tile), StagedAt{arguments.is_gated}, Terms{consumer}, thread);
    } else {
      for (int tile = place.first_tile(); tile < arguments.num_tiles; tile += place.tile_step()) {
        consumer.multiply_tile(tile);
        consumer.write_tile(tile);
      }
    }
  }
  if (arguments.num_splits > 1) {
    // Others may still read from here.
    __syncwarp();
    cluster_sync();
  }
}
