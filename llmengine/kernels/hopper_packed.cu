// The product of packed quantized weights and many rows of activations, on Hopper (compute capability 9.0).
//
// `packed_weights` describes the layout. A program computes 128 outputs, two tiles of 64, for ROWS rows of x. One thread
// copies words and scales to shared memory, another x; each of two warpgroups makes its tile's words numbers in
// registers, the left operand of a tensor core's product, and multiplies them by x where the copy left it. So weights are
// unpacked once for each ROWS rows, and pass through shared memory packed. Where tiles are too few or too many to fill all
// multiprocessors, programs share them, always adding up in the same order:
//   - programs that share the inputs of one tile form a cluster, and read each other's sums in shared memory;
//   - or all programs have equally many blocks, of one tile after the other. The program that has a tile's first block
//     writes its results. Those that have more of the tile begin with that, and leave their sums in memory.
//
// The source is compiled for one format at a time, with these macros:
//   ROWS          rows of x: 32, 64, 128 or 256
//   PROGRAMS      programs that share a multiprocessor, 1 or 2
//   X_BOXES       boxes of x, 64 columns each, that are copied together
//   WORD_SLOTS, X_SLOTS   copies of words and of x that can be under way
//
// hopper.cuh and packed_words.cuh, which has macros of its own, stand before it.

constexpr int BOXES = BLOCK / 64;             // of x
constexpr int TILE_BYTES = 64 * SLICE * 2;
constexpr int SCALES_BYTES = 64 * GROUPS * SCALE_BYTES;
constexpr int ZEROS_BYTES = 64 * ZERO_BYTES;
constexpr int WORDS_SLOT = 2 * TILE_BYTES;
constexpr int SIDE_SLOT = 2 * (SCALES_BYTES + ZEROS_BYTES);
constexpr int X_BOX = ROWS * 128;
constexpr int X_SLOT = X_BOXES * X_BOX;
constexpr int X_AT = 0;
constexpr int WORDS_AT = X_AT + X_SLOTS * X_SLOT;
constexpr int SIDE_AT = WORDS_AT + WORD_SLOTS * WORDS_SLOT;
constexpr int BARRIERS_AT = SIDE_AT + WORD_SLOTS * SIDE_SLOT;
// The first box with whose numbers all that a block's slot holds has been used. An arrival may overtake loads that nothing
// has used yet, so the slot is given back then, and not when they are issued.
constexpr int RELEASE_BOX = GROUPS > 1 ? (GROUPS - 1) * PER_GROUP * SLICE / 64 : 0;
constexpr int PITCH = 132;                    // floats from one row of sums to the next
constexpr int NUM_SUMS = ROWS / 2;            // of a thread
constexpr int CONSUMERS = 256;                // threads
static_assert(BOXES % X_BOXES == 0, "a copy of x is of one block");
constexpr int MOST_PARTS = BOXES > 1 ? 2 : 1;  // of a program, where two share a multiprocessor

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

// Arguments beside the tensors' maps.
struct Arguments {
  const unsigned char* scales;   // of groups
  const float* row_scales;       // or null
  const unsigned char* zeros;
  const void* bias;       // in the activations' dtype, or null
  void* out;
  long long out_stride;
  float* partials;        // sums that a program leaves for another: [program][4 of a thread][thread]
  int* flags;             // of each program: its sums are there; zero before and after
  int num_rows;           // of x
  int num_outputs;        // of the product, or of each half of a gated one
  int num_blocks;
  int num_tiles;          // of 64 rows of the matrix
  int row_tiles;          // tiles of results with the same outputs
  int num_splits;         // programs of a cluster
  int split_blocks;       // blocks of a program, at most
  int total_blocks;       // of all tiles, which all programs share; 0: those of a cluster share one tile
  int is_gated;           // silu of the first num_outputs times the rest is written
  int adds;               // the product is added to what `out` holds
  int is_wide;            // `out` is float32
  int is_even;            // four results in a row can be written at once
};

// What a program computes: blocks of a tile, then of the next one.
struct Parts {
  const Arguments& arguments;
  int tile;

  __device__ __forceinline__ explicit Parts(const Arguments& arguments) : arguments(arguments) {
    tile = is_even() ? program() * arguments.split_blocks / arguments.num_blocks : blockIdx.x / arguments.num_splits;
  }

  __device__ __forceinline__ bool is_even() const { return arguments.total_blocks > 0; }

  // Programs begin in the order of their numbers on the device. None waits for one that begins later: those with more of a
  // tile begin before the one that writes its results.
  __device__ __forceinline__ int program() const { return gridDim.x - 1 - blockIdx.x; }

  __device__ __forceinline__ int first_block() const {
    if (!is_even()) return blockIdx.x % arguments.num_splits * arguments.split_blocks;
    return max(program() * arguments.split_blocks - tile * arguments.num_blocks, 0);
  }

  __device__ __forceinline__ int end_block() const {
    if (!is_even()) return min(first_block() + arguments.split_blocks, arguments.num_blocks);
    return min((program() + 1) * arguments.split_blocks - tile * arguments.num_blocks, arguments.num_blocks);
  }

  __device__ __forceinline__ bool has_next() const {
    const int next = (tile + 1) * arguments.num_blocks;
    return is_even() && next < min((program() + 1) * arguments.split_blocks, arguments.total_blocks);
  }

  // The last of the programs that have the tile's blocks.
  __device__ __forceinline__ int last_program() const {
    return ((tile + 1) * arguments.num_blocks - 1) / arguments.split_blocks;
  }

  __device__ __forceinline__ bool writes_results() const { return !is_even() || first_block() == 0; }
  __device__ __forceinline__ int row() const { return tile % arguments.row_tiles * ROWS; }
  __device__ __forceinline__ int column() const { return tile / arguments.row_tiles; }  // in tiles
};

struct Pipe {
  u32 base;
  __device__ u32 x_full(int slot) const { return base + BARRIERS_AT + 8 * slot; }
  __device__ u32 x_empty(int slot) const { return base + BARRIERS_AT + 8 * (X_SLOTS + slot); }
  __device__ u32 words_full(int slot) const { return base + BARRIERS_AT + 8 * (2 * X_SLOTS + slot); }
  __device__ u32 words_empty(int slot) const { return base + BARRIERS_AT + 8 * (2 * X_SLOTS + WORD_SLOTS + slot); }
  // Results of a tile have been read from where copies go.
  __device__ u32 written() const { return base + BARRIERS_AT + 8 * (2 * X_SLOTS + 2 * WORD_SLOTS); }
};

// A warpgroup's part of the products: the sums of its tile's outputs.
struct Consumer {
  const Pipe& pipe;
  const unsigned char* shared;
  int group, lane;
  u32 words_at;  // in a tile's words: where the lane's 16 bytes of the first 16 words of its rows lie
  int own_row;
  bool has_begun = false;
  Turn<WORD_SLOTS> word_turn;
  Turn<X_SLOTS> x_turn;
  // In turn: those of a product may not be touched until it is done, which the compiler does not see to.
  u32 numbers[2][4][4];
  float sums[NUM_SUMS];

  __device__ __forceinline__ Consumer(const Pipe& pipe, const unsigned char* shared, int warp, int lane)
      : pipe(pipe), shared(shared), group(warp / 4), lane(lane) {
    const int row = warp % 4 * 16;
    words_at = group * TILE_BYTES + swizzled(row + lane % 16, lane / 16);
    own_row = row + lane / 4;
  }

  // The next blocks; an even number of boxes at a time, so that numbers take turns.
  __device__ __forceinline__ void multiply(int num_blocks) {
#pragma unroll
    for (int i = 0; i < NUM_SUMS; ++i) sums[i] = 0.0f;
    if constexpr (BOXES == 1) {
      for (; num_blocks > 1; num_blocks -= 2) {
        multiply_block<0>();
        multiply_block<1>();
      }
      if (num_blocks > 0) multiply_block<0>();
    } else {
      for (; num_blocks > 0; --num_blocks) multiply_block<0>();
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }

  // FIRST: boxes that come before the block's.
  template <int FIRST>
  __device__ __forceinline__ void multiply_block() {
    barrier_wait(pipe.words_full(word_turn.slot), word_turn.parity);
    Weights weights;
    load(weights);
    multiply_box<FIRST, 0>(weights);
    if constexpr (BOXES > 1) multiply_box<FIRST, 1>(weights);
    if constexpr (BOXES > 2) {
      multiply_box<FIRST, 2>(weights);
      multiply_box<FIRST, 3>(weights);
    }
    word_turn.next();
  }

  __device__ __forceinline__ void load(Weights& weights) const {
    // The next 16 words are two chunks further on, whose numbers the copy has combined with the row's by exclusive or.
    const u32 words = pipe.base + WORDS_AT + word_turn.slot * WORDS_SLOT + words_at;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) load_matrices(weights.words[step], words ^ (step * 32));
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
  __device__ __forceinline__ void multiply_box(const Weights& weights) {
    u32(&now)[4][4] = numbers[(FIRST + BOX) & 1];
    make_numbers<BOX, 0>(now[0], weights);
    make_numbers<BOX, 1>(now[1], weights);
    make_numbers<BOX, 2>(now[2], weights);
    make_numbers<BOX, 3>(now[3], weights);
    constexpr int OF_SLOT = BOX % X_BOXES;
    if (OF_SLOT == 0) barrier_wait(pipe.x_full(x_turn.slot), x_turn.parity);
    const u64 box = box_descriptor(pipe.base + X_AT + x_turn.slot * X_SLOT) + OF_SLOT * (X_BOX / 16);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < 4; ++step) ::multiply(sums, now[step], box + 2 * step);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    // The product before this one, perhaps of the block before, is done: its numbers and its box may be replaced.
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (BOX == RELEASE_BOX && lane == 0) barrier_arrive(pipe.words_empty(word_turn.slot));
    if (OF_SLOT == 0) {
      if (lane == 0 && (BOX > 0 || has_begun)) barrier_arrive(pipe.x_empty(x_turn.slot == 0 ? X_SLOTS - 1 : x_turn.slot - 1));
      has_begun = true;
    }
    if (OF_SLOT == X_BOXES - 1) x_turn.next();
  }

  // Sums to shared memory as [row of x][output], where x and the words have been.
  __device__ __forceinline__ void stage(unsigned char* target_bytes, int thread) const {
    float* target = reinterpret_cast<float*>(target_bytes);
    const int lane = thread % 32, output = thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < NUM_SUMS; ++i) {
      const int of_row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      target[of_row * PITCH + output + (i % 4 / 2) * 8] = sums[i];
    }
  }

  // Leave the sums for the program that writes the tile's results.
  __device__ __forceinline__ void give(const Arguments& arguments, int program, int thread) const {
    float4* place = reinterpret_cast<float4*>(arguments.partials) + program * (NUM_SUMS / 4) * CONSUMERS + thread;
#pragma unroll
    for (int i = 0; i < NUM_SUMS / 4; ++i)
      __stcg(place + i * CONSUMERS, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (thread == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(arguments.flags + program) : "memory");
  }

  // Add what others have left of this program's tile.
  __device__ __forceinline__ void take(const Arguments& arguments, const Parts& parts, int thread) {
    const int first = parts.program() + 1, last = parts.last_program();
    if (thread < 32)
      for (int program = first + thread; program <= last; program += 32) {
        int there = 0;
        while (there == 0)
          asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(arguments.flags + program) : "memory");
        arguments.flags[program] = 0;
      }
    asm volatile("bar.sync 1, 256;" ::: "memory");
    for (int program = first; program <= last; ++program) {
      const float4* place =
          reinterpret_cast<const float4*>(arguments.partials) + program * (NUM_SUMS / 4) * CONSUMERS + thread;
#pragma unroll
      for (int i = 0; i < NUM_SUMS / 4; ++i) {
        const float4 more = __ldcg(place + i * CONSUMERS);
        sums[4 * i] += more.x, sums[4 * i + 1] += more.y, sums[4 * i + 2] += more.z, sums[4 * i + 3] += more.w;
      }
    }
  }
};

// Where sums lie in a row of a tile: gates come before what they multiply.
struct StagedAt {
  __device__ __forceinline__ int operator()(int output, int part) const { return output + 64 * part; }
};

// What the sums of four outputs are multiplied by, and what is added to them.
struct Terms {
  const Arguments& arguments;
  __device__ __forceinline__ void operator()(float (&sums)[4], int row, int output, int count) const {
    float values[4];
    if (arguments.row_scales != nullptr) {
      load_constants(values, arguments.row_scales, output, count);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] *= values[i];
    }
    if (arguments.bias != nullptr) {
      load_constants(values, arguments.bias, output, count);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += values[i];
    }
  }
};

// The next part for a thread that copies, as soon as its copies may begin: results pass through the same memory.
static __device__ __forceinline__ bool await_next(const Pipe& pipe, Parts& parts, u32& parity) {
  if (!parts.has_next()) return false;
  if (parts.writes_results()) {
    barrier_wait(pipe.written(), parity);
    parity ^= 1;
  }
  ++parts.tile;
  return true;
}

// The copies of two threads, of words and of x, each into the next slot as soon as that is empty.
static __device__ __forceinline__ void copy_words(const Pipe& pipe, const TensorMap& map, const Arguments& arguments) {
  const u64 once = cache_policy_first();
  Turn<WORD_SLOTS> turn;
  Parts parts(arguments);
  u32 parity = 0;
  while (true) {
    const int column = parts.column();
    const int first = arguments.is_gated ? column : 2 * column;
    const int second = min(arguments.is_gated ? column + arguments.num_outputs / 64 : first + 1, arguments.num_tiles - 1);
    const int end_block = parts.end_block();
    for (int block = parts.first_block(); block < end_block; ++block) {
      barrier_wait(pipe.words_empty(turn.slot), turn.parity ^ 1);
      const u32 full = pipe.words_full(turn.slot), side = pipe.base + SIDE_AT + turn.slot * SIDE_SLOT;
      barrier_expect(full, WORDS_SLOT + SIDE_SLOT);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const long long place = static_cast<long long>(i == 0 ? first : second) * arguments.num_blocks + block;
        copy_box(pipe.base + WORDS_AT + turn.slot * WORDS_SLOT + i * TILE_BYTES, &map, 0, static_cast<int>(place * 64), full,
                 once);
        if (SCALES_BYTES > 0)
          copy_bytes(side + i * SCALES_BYTES, arguments.scales + place * SCALES_BYTES, SCALES_BYTES, full);
        if (ZEROS_BYTES > 0)
          copy_bytes(side + 2 * SCALES_BYTES + i * ZEROS_BYTES, arguments.zeros + place * ZEROS_BYTES, ZEROS_BYTES, full);
      }
      turn.next();
    }
    if (!await_next(pipe, parts, parity)) return;
  }
}

static __device__ __forceinline__ void copy_x(const Pipe& pipe, const TensorMap& map, const Arguments& arguments) {
  const u64 often = cache_policy_last();
  Turn<X_SLOTS> turn;
  Parts parts(arguments);
  u32 parity = 0;
  while (true) {
    const int end_box = parts.end_block() * BOXES;
    for (int box = parts.first_block() * BOXES; box < end_box; box += X_BOXES) {
      barrier_wait(pipe.x_empty(turn.slot), turn.parity ^ 1);
      const u32 full = pipe.x_full(turn.slot), target = pipe.base + X_AT + turn.slot * X_SLOT;
      barrier_expect(full, X_SLOT);
#pragma unroll
      for (int i = 0; i < X_BOXES; ++i)
        copy_box(target + i * X_BOX, &map, (box + i) * 64, parts.row(), full, often);
      turn.next();
    }
    if (!await_next(pipe, parts, parity)) return;
  }
}

// Grid: num_splits programs for each tile, a cluster, or as many as share all blocks.
extern "C" __global__ void __launch_bounds__(384, PROGRAMS)
hopper_packed(const __grid_constant__ TensorMap words_map, const __grid_constant__ TensorMap x_map,
              const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int num_splits = arguments.num_splits;
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
    barrier_init(pipe.written(), 8);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  if (warp >= 8) {
    if (PROGRAMS == 2)
      asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    else
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == 8 && lane == 0) copy_words(pipe, words_map, arguments);
    if (warp == 9 && lane == 0) {
      // What x holds comes from the kernels before; words and scales do not.
      asm volatile("griddepcontrol.wait;" ::: "memory");
      copy_x(pipe, x_map, arguments);
    }
    __syncwarp();
    if (num_splits > 1) cluster_sync();
  } else {
    if (PROGRAMS == 2)
      asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    else
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer consumer(pipe, shared, warp, lane);
    Parts parts(arguments);
    // Two programs on a multiprocessor have no registers to spare for a loop around that over blocks, nor for a second
    // part where blocks come in pairs.
#pragma unroll (PROGRAMS == 2 ? MOST_PARTS : 1)
    for (int i = 0; PROGRAMS == 1 || i < MOST_PARTS; ++i) {
      consumer.multiply(parts.end_block() - parts.first_block());
      // So that the compiler computes what depends on it when it is needed: the loop over blocks leaves no registers.
      int thread = threadIdx.x;
      asm volatile("" : "+r"(thread));
      // `partials`, `flags` and `out` are of the kernels before, too.
      asm volatile("griddepcontrol.wait;" ::: "memory");
      const bool goes_on = parts.has_next();
      if (parts.writes_results()) {
        if (parts.is_even() && parts.last_program() > parts.program()) consumer.take(arguments, parts, thread);
        asm volatile("bar.sync 1, 256;" ::: "memory");
        consumer.stage(shared, thread);
        if (num_splits > 1) {
          __syncwarp();
          cluster_sync();
        } else {
          asm volatile("bar.sync 1, 256;" ::: "memory");
        }
        const int outputs = arguments.is_gated ? 64 : 128;
        const Target results{arguments.out, arguments.out_stride, arguments.num_rows, arguments.num_outputs,
                             arguments.adds, arguments.is_wide, arguments.is_even, arguments.is_gated};
        const Staged<float> staged{pipe.base, PITCH, static_cast<int>(blockIdx.x) % num_splits, num_splits,
                                   ROWS / num_splits, outputs};
        staged.write<4 / PROGRAMS>(results, parts.row(), parts.column() * outputs, StagedAt(), Terms{arguments}, thread);
        if (goes_on) {
          asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
          __syncwarp();
          if (thread % 32 == 0) barrier_arrive(pipe.written());
        }
      } else {
        consumer.give(arguments, parts.program(), thread);
      }
      if (!goes_on) break;
      ++parts.tile;
    }
  }
  if (num_splits > 1) {
    // Others may still read from here.
    __syncwarp();
    cluster_sync();
  }
}
