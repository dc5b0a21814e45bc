// The product of packed quantized weights and many rows of activations, on Hopper (compute capability 9.0).
//
// `packed_weights` describes the layout. A program computes 128 outputs, two tiles of 64, for ROWS rows of x. One thread
// copies words and scales to shared memory, another x; each of two warpgroups makes its tile's words numbers in
// registers, the left operand of a tensor core's product, and multiplies them by x where the copy left it. So weights are
// unpacked once for each ROWS rows, and pass through shared memory packed. Programs that share the inputs form a cluster
// and add their sums up through each other's shared memory, always in the same order.
//
// The source is compiled for one format at a time, with these macros:
//   ROWS          rows of x: 32, 64, 128 or 256
//   PROGRAMS      programs that share a multiprocessor, 1 or 2
//   WORD_SLOTS, X_SLOTS   copies of words and of x that can be under way
//
// hopper.cuh and packed_words.cuh, which has macros of its own, stand before it.

constexpr int BOXES = BLOCK / 64;             // of x, 64 columns each
constexpr int TILE_BYTES = 64 * SLICE * 2;
constexpr int SCALES_BYTES = 64 * GROUPS * SCALE_BYTES;
constexpr int ZEROS_BYTES = 64 * ZERO_BYTES;
constexpr int WORDS_SLOT = 2 * TILE_BYTES;
constexpr int SIDE_SLOT = 2 * (SCALES_BYTES + ZEROS_BYTES);
constexpr int X_SLOT = ROWS * 128;
constexpr int X_AT = 0;
constexpr int WORDS_AT = X_AT + X_SLOTS * X_SLOT;
constexpr int SIDE_AT = WORDS_AT + WORD_SLOTS * WORDS_SLOT;
constexpr int BARRIERS_AT = SIDE_AT + WORD_SLOTS * SIDE_SLOT;
// The first box with whose numbers all that a block's slot holds has been used. An arrival may overtake loads that nothing
// has used yet, so the slot is given back then, and not when they are issued.
constexpr int RELEASE_BOX = GROUPS > 1 ? (GROUPS - 1) * PER_GROUP * SLICE / 64 : 0;
constexpr int PITCH = 132;                    // floats from one row of sums to the next
constexpr int NUM_SUMS = ROWS / 2;            // of a thread

static __device__ __forceinline__ void copy_bytes(u32 target, const void* source, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

// A group's scale, twice, in the activations' dtype.
static __device__ __forceinline__ u32 scale_pair(const unsigned char* scales, int group) {
#if SCALE == FLOAT32
  return halves(reinterpret_cast<const float*>(scales)[group]);
#elif SCALE == E4M3
  u32 pair;
  u16 bits = scales[group];
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bits));
  return BF16 ? halves(widened(static_cast<u16>(pair), false)) : (pair & 0xffff) * 0x10001u;
#else
  const bool is_bf16 = SCALE == BFLOAT16;
  u16 bits = reinterpret_cast<const u16*>(scales)[group];
  if (is_bf16 == BF16) return static_cast<u32>(bits) * 0x10001u;
  return halves(widened(bits, is_bf16));
#endif
}

static __device__ __forceinline__ u32 times(u32 numbers, u32 scale) {
  u32 product;
#if BF16
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(numbers), "r"(scale));
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(numbers), "r"(scale));
#endif
  return product;
}

WGMMA

struct Weights {
  u32 words[STEPS][4];
  u32 scales[2][GROUPS > 0 ? GROUPS : 1];  // of the thread's two rows
  Zero zeros[2];
};

template <int BOX, int STEP>
static __device__ __forceinline__ void make_numbers(u32 (&numbers)[4], const Weights& weights) {
  constexpr int column = BOX * 64 + STEP * 16, index = column / SLICE, step = column % SLICE / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    numbers[i] = unpacked<index>(weights.words[step][i], weights.zeros[i & 1]);
    if (GROUPS > 0) numbers[i] = times(numbers[i], weights.scales[i & 1][GROUPS > 0 ? index / PER_GROUP : 0]);
  }
}

struct Pipe {
  u32 base;
  __device__ u32 x_full(int slot) const { return base + BARRIERS_AT + 8 * slot; }
  __device__ u32 x_empty(int slot) const { return base + BARRIERS_AT + 8 * (X_SLOTS + slot); }
  __device__ u32 words_full(int slot) const { return base + BARRIERS_AT + 8 * (2 * X_SLOTS + slot); }
  __device__ u32 words_empty(int slot) const { return base + BARRIERS_AT + 8 * (2 * X_SLOTS + WORD_SLOTS + slot); }
};

// A warpgroup's part of the products: the sums of its tile's outputs.
struct Consumer {
  const Pipe& pipe;
  const unsigned char* shared;
  int group, lane;
  int from_row, from_chunk;  // of a matrix that is loaded: the row and the chunk of 16 bytes whose address the lane gives
  int own_row;
  Turn<WORD_SLOTS> word_turn;
  Turn<X_SLOTS> x_turn;
  // In turn: those of a product may not be touched until it is done, which the compiler does not see to.
  u32 numbers[2][4][4];
  float sums[NUM_SUMS];

  __device__ __forceinline__ Consumer(const Pipe& pipe, const unsigned char* shared, int warp, int lane)
      : pipe(pipe), shared(shared), group(warp / 4), lane(lane) {
    const int row = warp % 4 * 16;
    from_row = row + lane % 16;
    from_chunk = lane / 16;
    own_row = row + lane / 4;
#pragma unroll
    for (int i = 0; i < NUM_SUMS; ++i) sums[i] = 0.0f;
  }

  // An even number of boxes at a time, so that numbers take turns.
  __device__ __forceinline__ void multiply(int first_block, int end_block) {
    int block = first_block;
    if constexpr (BOXES == 1) {
      for (; block + 1 < end_block; block += 2) {
        multiply_block<0>(block > first_block);
        multiply_block<1>(true);
      }
      if (block < end_block) multiply_block<0>(block > first_block);
    } else {
      for (; block < end_block; ++block) multiply_block<0>(block > first_block);
    }
  }

  // FIRST: boxes that come before the block's.
  template <int FIRST>
  __device__ __forceinline__ void multiply_block(bool has_before) {
    barrier_wait(pipe.words_full(word_turn.slot), word_turn.parity);
    Weights weights;
    load(weights);
    multiply_box<FIRST, 0>(weights, has_before);
    if constexpr (BOXES > 1) multiply_box<FIRST, 1>(weights, has_before);
    if constexpr (BOXES > 2) {
      multiply_box<FIRST, 2>(weights, has_before);
      multiply_box<FIRST, 3>(weights, has_before);
    }
    word_turn.next();
  }

  __device__ __forceinline__ void load(Weights& weights) const {
    const u32 words = pipe.base + WORDS_AT + word_turn.slot * WORDS_SLOT + group * TILE_BYTES;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      load_matrices(weights.words[step], words + swizzled(from_row, 2 * step + from_chunk));
    const unsigned char* side = shared + SIDE_AT + word_turn.slot * SIDE_SLOT;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of_row = own_row + 8 * half;
      if (GROUPS > 0)
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
          weights.scales[half][i] = scale_pair(side + group * SCALES_BYTES + of_row * (GROUPS * SCALE_BYTES), i);
      if (ZERO_BYTES > 0)
        weights.zeros[half] =
            *reinterpret_cast<const Zero*>(side + 2 * SCALES_BYTES + group * ZEROS_BYTES + of_row * sizeof(Zero));
      else
        weights.zeros[half] = 0;
    }
  }

  template <int FIRST, int BOX>
  __device__ __forceinline__ void multiply_box(const Weights& weights, bool has_before) {
    u32(&now)[4][4] = numbers[(FIRST + BOX) & 1];
    make_numbers<BOX, 0>(now[0], weights);
    make_numbers<BOX, 1>(now[1], weights);
    make_numbers<BOX, 2>(now[2], weights);
    make_numbers<BOX, 3>(now[3], weights);
    barrier_wait(pipe.x_full(x_turn.slot), x_turn.parity);
    u64 box = box_descriptor(pipe.base + X_AT + x_turn.slot * X_SLOT);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < 4; ++step) ::multiply(sums, now[step], box + 2 * step);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    // The product before this one, perhaps of the block before, is done: its numbers and its box may be replaced.
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (BOX == RELEASE_BOX && lane == 0) barrier_arrive(pipe.words_empty(word_turn.slot));
    if (lane == 0 && (BOX > 0 || has_before))
      barrier_arrive(pipe.x_empty(x_turn.slot == 0 ? X_SLOTS - 1 : x_turn.slot - 1));
    x_turn.next();
  }

  // Sums to shared memory as [row of x][output], where x and the words have been.
  __device__ __forceinline__ void stage(unsigned char* target_bytes) const {
    float* target = reinterpret_cast<float*>(target_bytes);
    const int output = group * 64 + own_row;
#pragma unroll
    for (int i = 0; i < NUM_SUMS; ++i) {
      const int of_row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      target[of_row * PITCH + output + (i % 4 / 2) * 8] = sums[i];
    }
  }
};

// Arguments beside the tensors' maps.
struct Arguments {
  const unsigned char* scales;   // of groups
  const float* row_scales;       // or null
  const unsigned char* zeros;
  const void* bias;       // in the activations' dtype, or null
  void* out;
  long long out_stride;
  int num_rows;           // of x
  int num_outputs;        // of the product, or of each half of a gated one
  int num_blocks;
  int num_tiles;
  int split_blocks;       // blocks of a program
  int is_gated;           // silu of the first num_outputs times the rest is written
  int adds;               // the product is added to what `out` holds
  int is_wide;            // `out` is float32
  int is_even;            // four results in a row can be written at once
};

// Where sums lie in a row of a tile: gates come before what they multiply.
struct StagedAt {
  __device__ __forceinline__ int operator()(int output, int part) const { return output + 64 * part; }
};

// What the sum of an output is multiplied by, and what is added to it.
struct Terms {
  const Arguments& arguments;
  __device__ __forceinline__ void operator()(float& factor, float& bias, int row, int output) const {
    factor = arguments.row_scales == nullptr ? 1.0f : __ldg(arguments.row_scales + output);
    bias = arguments.bias == nullptr ? 0.0f : constant_number(arguments.bias, output);
  }
};

// The copies of two threads, of words and of x, each into the next slot as soon as that is empty.
static __device__ __forceinline__ void copy_words(const Pipe& pipe, const TensorMap& map, const Arguments& arguments,
                                                  const int (&tiles)[2], int first_block, int end_block) {
  const u64 once = cache_policy_first();
  Turn<WORD_SLOTS> turn;
  for (int block = first_block; block < end_block; ++block) {
    barrier_wait(pipe.words_empty(turn.slot), turn.parity ^ 1);
    const u32 full = pipe.words_full(turn.slot), side = pipe.base + SIDE_AT + turn.slot * SIDE_SLOT;
    barrier_expect(full, WORDS_SLOT + SIDE_SLOT);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const long long place = static_cast<long long>(tiles[i]) * arguments.num_blocks + block;
      copy_box(pipe.base + WORDS_AT + turn.slot * WORDS_SLOT + i * TILE_BYTES, &map, 0, static_cast<int>(place * 64), full,
               once);
      if (SCALES_BYTES > 0)
        copy_bytes(side + i * SCALES_BYTES, arguments.scales + place * SCALES_BYTES, SCALES_BYTES, full);
      if (ZEROS_BYTES > 0)
        copy_bytes(side + 2 * SCALES_BYTES + i * ZEROS_BYTES, arguments.zeros + place * ZEROS_BYTES, ZEROS_BYTES, full);
    }
    turn.next();
  }
}

static __device__ __forceinline__ void copy_x(const Pipe& pipe, const TensorMap& map, int first_row, int first_box,
                                              int end_box) {
  const u64 often = cache_policy_last();
  Turn<X_SLOTS> turn;
  for (int box = first_box; box < end_box; ++box) {
    barrier_wait(pipe.x_empty(turn.slot), turn.parity ^ 1);
    const u32 full = pipe.x_full(turn.slot);
    barrier_expect(full, X_SLOT);
    copy_box(pipe.base + X_AT + turn.slot * X_SLOT, &map, box * 64, first_row, full, often);
    turn.next();
  }
}

// Grid: (programs that share the inputs, blocks of rows, 128 outputs each, 64 if gated); the first is a cluster.
extern "C" __global__ void __launch_bounds__(384, PROGRAMS)
hopper_packed(const __grid_constant__ TensorMap words_map, const __grid_constant__ TensorMap x_map,
              const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int split = blockIdx.x, num_splits = gridDim.x, first_row = blockIdx.y * ROWS;
  const int first_block = split * arguments.split_blocks;
  const int end_block = min(first_block + arguments.split_blocks, arguments.num_blocks);
  const int outputs = arguments.is_gated ? 64 : 128;
  const int first_output = blockIdx.z * outputs;
  int tiles[2];
  tiles[0] = arguments.is_gated ? blockIdx.z : 2 * blockIdx.z;
  tiles[1] = min(arguments.is_gated ? tiles[0] + arguments.num_outputs / 64 : tiles[0] + 1, arguments.num_tiles - 1);
  Pipe pipe{shared_address(shared)};

  if (thread == 0) {
    for (int slot = 0; slot < X_SLOTS; ++slot) {
      barrier_init(pipe.x_full(slot), 1);
      barrier_init(pipe.x_empty(slot), 8);
    }
    for (int slot = 0; slot < WORD_SLOTS; ++slot) {
      barrier_init(pipe.words_full(slot), 1);
      barrier_init(pipe.words_empty(slot), 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  if (warp >= 8) {
    if (PROGRAMS == 2)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    else
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == 8 && lane == 0) copy_words(pipe, words_map, arguments, tiles, first_block, end_block);
    if (warp == 9 && lane == 0) {
      // What x holds comes from the kernels before; words and scales do not.
      asm volatile("griddepcontrol.wait;" ::: "memory");
      copy_x(pipe, x_map, first_row, first_block * BOXES, end_block * BOXES);
    }
    __syncwarp();
    if (num_splits > 1) cluster_sync();
  } else {
    if (PROGRAMS == 2)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    else
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer consumer(pipe, shared, warp, lane);
    consumer.multiply(first_block, end_block);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("bar.sync 1, 256;" ::: "memory");
    consumer.stage(shared);
    if (num_splits > 1) {
      __syncwarp();
      cluster_sync();
    } else {
      asm volatile("bar.sync 1, 256;" ::: "memory");
    }
    if (arguments.adds) asm volatile("griddepcontrol.wait;" ::: "memory");
    const Target results{arguments.out, arguments.out_stride, arguments.num_rows, arguments.num_outputs,
                         arguments.adds, arguments.is_wide, arguments.is_even, arguments.is_gated};
    const Staged<float> staged{pipe.base, PITCH, split, num_splits, ROWS / num_splits, outputs};
    staged.write(results, first_row, first_output, StagedAt(), Terms{arguments}, thread);
  }
  if (num_splits > 1) {
    // Others may still read from here.
    __syncwarp();
    cluster_sync();
  }
}
