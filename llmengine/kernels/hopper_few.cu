// The product of packed quantized weights and a few rows of activations, on Hopper (compute capability 9.0).
//
// Reading the weights is what such a product costs, so a kernel keeps as many copies under way as shared memory holds,
// from before its activations are there, and its warps do not wait for each other. A program computes some strips of 16
// outputs. Its warps have every so many-th block of columns each: a warp copies words, scales and zero points of a few
// strips at a time, makes words numbers in registers, the left operand of a tensor core's product, and multiplies them by
// eight rows of x each; sums of a group are multiplied by its scale. In the end a program adds its warps' sums up, always
// in the same order.
//
// The source is compiled for one format at a time, with the macros of packed_words.cuh and these:
//   ROWS          rows of x, at most: 1, 8, 16 or 32
//   WARPS         of a program
//   PROGRAMS      programs that share a multiprocessor
//   CHUNK         strips that a warp has at a time
//   NUM_SLOTS     copies of a warp that can be under way, of its words in a block
//   STREAMS       x is copied with the words; otherwise all of it at first, since a warp has more than one chunk
//
// hopper.cuh and packed_words.cuh stand before it.

constexpr int TILES = (ROWS + 7) / 8;
constexpr int WORD_BYTES = 16 * SLICE * 2;  // of a strip's block, as the next two
constexpr int STRIP_SCALES = 16 * GROUPS * SCALE_BYTES;
constexpr int STRIP_ZEROS = 16 * ZERO_BYTES;
constexpr int SIDE_BYTES = STRIP_SCALES + STRIP_ZEROS;
constexpr int X_PITCH = BLOCK * 2 + 16;  // bytes from one row to the next: eight rows meet no bank twice
constexpr int X_BYTES = ROWS * X_PITCH;
constexpr int SLOT_BYTES = CHUNK * (WORD_BYTES + SIDE_BYTES) + (STREAMS ? X_BYTES : 0);
constexpr int SUM_PAD = 4;  // floats

struct Arguments {
  const void* x;
  const unsigned char* words;
  const unsigned char* scales;  // of groups
  const float* row_scales;      // or null
  const unsigned char* zeros;
  const void* bias;             // in the activations' dtype, or null
  void* out;
  long long out_stride;
  int num_rows;     // of x
  int num_outputs;  // of the product, or of each half of a gated one
  int num_blocks;
  int num_tiles;    // of 64 rows of the matrix
  int strips;       // of a program
  int is_gated;     // silu of the first num_outputs times the rest is written
  int adds;         // the product is added to what `out` holds
  int is_wide;      // `out` is float32
  int is_even;      // four results in a row can be written at once
};

// sums[0] and [1]: of output lane / 4 and rows lane % 4 * 2 and the one after; [2] and [3]: of output lane / 4 + 8.
static __device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&weights)[4], u32 x0, u32 x1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
#endif
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(x0), "r"(x1));
}

static __device__ __forceinline__ float scale_number(const unsigned char* scales, int group) {
#if SCALE == FLOAT32
  return reinterpret_cast<const float*>(scales)[group];
#elif SCALE == E4M3
  u32 pair;
  u16 bits = scales[group];
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bits));
  return widened(static_cast<u16>(pair), false);
#else
  return widened(reinterpret_cast<const u16*>(scales)[group], SCALE == BFLOAT16);
#endif
}

// 16 bytes to shared memory; the L2 need not keep them if `once` says so.
static __device__ __forceinline__ void copy_16(u32 target, const void* source, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "l"(policy)
               : "memory");
}

static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last COUNT of this thread's groups of copies are there.
template <int COUNT>
static __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

// What a warp has to do: blocks of columns of one chunk of strips, then of the next.
struct Place {
  int chunk;
  int block;
  int index;  // of the block among the warp's
};

struct Warp {
  const Arguments& arguments;
  u32 ring, all_x, nothing;  // addresses in shared memory: of slots, of x if it is there as a whole, of 16 bytes of zeros
  int lane, index;  // of the warp: the first of its blocks

  // Where x of a slot is, if it is copied with the words.
  __device__ __forceinline__ u32 slot_x(int slot) const {
    return ring + slot * SLOT_BYTES + CHUNK * (WORD_BYTES + SIDE_BYTES);
  }

  __device__ __forceinline__ void next(Place& place) const {
    place.block += WARPS;
    ++place.index;
    if (place.block >= arguments.num_blocks) {
      place.block = index;
      place.index = 0;
      ++place.chunk;
    }
  }

  // Of the matrix: of a gated pair, half of a program's strips are of each.
  __device__ __forceinline__ int strip_of(int local) const {
    const int half = arguments.is_gated ? arguments.strips / 2 : arguments.strips;
    const int strip = blockIdx.x * half + (local < half ? local : arguments.num_outputs / 16 + local - half);
    return min(strip, arguments.num_tiles * 4 - 1);
  }

  __device__ __forceinline__ void copy_words(const Place& place, int slot, u64 policy) const {
    const u32 target = ring + slot * SLOT_BYTES;
    constexpr int ROW_CHUNKS = SLICE / 8, LANE_ROWS = 32 / ROW_CHUNKS;
#pragma unroll
    for (int s = 0; s < CHUNK; ++s) {
      const int strip = strip_of(place.chunk * CHUNK + s);
      const long long block = static_cast<long long>(strip / 4) * arguments.num_blocks + place.block;
      const unsigned char* source = arguments.words + (block * 4 + strip % 4) * WORD_BYTES + lane * 16;
#pragma unroll
      for (int i = 0; i < WORD_BYTES / 512; ++i)
        copy_16(target + s * WORD_BYTES + swizzled(i * LANE_ROWS + lane / ROW_CHUNKS, lane % ROW_CHUNKS),
                source + i * 512, policy);
    }
    if constexpr (SIDE_BYTES > 0) {
      constexpr int OF_STRIP = SIDE_BYTES / 16;
#pragma unroll
      for (int first = 0; first < CHUNK * OF_STRIP; first += 32) {
        const int s = (first + lane) / OF_STRIP, byte = (first + lane) % OF_STRIP * 16;
        if (s < CHUNK) {
          const int strip = strip_of(place.chunk * CHUNK + s);
          const long long block = static_cast<long long>(strip / 4) * arguments.num_blocks + place.block;
          const long long quarter = block * 4 + strip % 4;
          const unsigned char* source = byte < STRIP_SCALES
                                            ? arguments.scales + quarter * STRIP_SCALES + byte
                                            : arguments.zeros + quarter * STRIP_ZEROS + byte - STRIP_SCALES;
          copy_16(target + CHUNK * WORD_BYTES + s * SIDE_BYTES + byte, source, policy);
        }
      }
    }
  }

  __device__ __forceinline__ void copy_x(int block, u32 target, u64 policy) const {
    constexpr int ROW_CHUNKS = BLOCK / 8;
    const u16* source = static_cast<const u16*>(arguments.x) + static_cast<long long>(block) * BLOCK;
    for (int i = lane; i < arguments.num_rows * ROW_CHUNKS; i += 32) {
      const int row = i / ROW_CHUNKS, at = i % ROW_CHUNKS;
      const long long first = static_cast<long long>(row) * arguments.num_blocks * BLOCK;
      copy_16(target + row * X_PITCH + at * 16, source + first + at * 8, policy);
    }
  }
};

// A warp's part of the products.
struct Sums {
  float of[CHUNK][TILES][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < CHUNK; ++s)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) of[s][tile][i] = 0.0f;
  }
};

struct Weights {
  u32 words[CHUNK][STEPS][4];
  Zero zeros[CHUNK][2];
  const unsigned char* scales;  // of the first strip and the lane's first output
};

struct Columns {
  u32 address[TILES];
  u32 pitch[TILES];  // from 32 columns to the next; none for rows that x does not have
};

// The columns of value INDEX of all words.
template <int INDEX>
static __device__ __forceinline__ void multiply_value(Sums& sums, const Weights& weights, Columns& x) {
#pragma unroll
  for (int pair = 0; pair < STEPS / 2; ++pair) {
    u32 columns[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      load_matrices(columns[tile], x.address[tile]);
      x.address[tile] += x.pitch[tile];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int s = 0; s < CHUNK; ++s) {
        u32 numbers[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          numbers[i] = unpacked<INDEX>(weights.words[s][2 * pair + half][i], weights.zeros[s][i & 1]);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
          multiply(sums.of[s][tile], numbers, columns[tile][2 * half], columns[tile][2 * half + 1]);
      }
  }
}

template <int FIRST, int COUNT>
static __device__ __forceinline__ void multiply_values(Sums& sums, const Weights& weights, Columns& x) {
  multiply_value<FIRST>(sums, weights, x);
  if constexpr (COUNT > 1) multiply_values<FIRST + 1, COUNT - 1>(sums, weights, x);
}

template <int GROUP>
static __device__ __forceinline__ void multiply_groups(Sums& sums, const Weights& weights, Columns& x) {
  Sums of_group;
  of_group.clear();
  multiply_values<GROUP * PER_GROUP, PER_GROUP>(of_group, weights, x);
#pragma unroll
  for (int s = 0; s < CHUNK; ++s) {
    const unsigned char* scales = weights.scales + s * SIDE_BYTES;
    const float low = scale_number(scales, GROUP), high = scale_number(scales + 8 * GROUPS * SCALE_BYTES, GROUP);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums.of[s][tile][i] = fmaf(i < 2 ? low : high, of_group.of[s][tile][i], sums.of[s][tile][i]);
  }
  if constexpr (GROUP + 1 < GROUPS) multiply_groups<GROUP + 1>(sums, weights, x);
}

static __device__ __forceinline__ void multiply_block(Sums& sums, const Warp& warp, const unsigned char* shared,
                                                      u32 base, int slot, u32 x_at) {
  const int lane = warp.lane;
  const u32 words = warp.ring + slot * SLOT_BYTES;
  const unsigned char* side = shared + (words - base) + CHUNK * WORD_BYTES;
  Weights weights;
#pragma unroll
  for (int s = 0; s < CHUNK; ++s) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      load_matrices(weights.words[s][step], words + s * WORD_BYTES + swizzled(lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int half = 0; half < 2; ++half)
      weights.zeros[s][half] =
          ZERO_BYTES > 0
              ? reinterpret_cast<const Zero*>(side + s * SIDE_BYTES + STRIP_SCALES)[lane / 4 + 8 * half]
              : 0;
  }
  weights.scales = side + lane / 4 * (GROUPS * SCALE_BYTES);
  Columns x;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int row = tile * 8 + lane % 8;
    const bool exists = row < warp.arguments.num_rows;
    x.address[tile] = exists ? x_at + row * X_PITCH + lane / 8 * 16 : warp.nothing;
    x.pitch[tile] = exists ? 64 : 0;
  }
  if constexpr (GROUPS > 0)
    multiply_groups<0>(sums, weights, x);
  else
    multiply_values<0, VALUES>(sums, weights, x);
}

// Sums of a chunk to shared memory as [warp][row][output].
static __device__ __forceinline__ void stage(const Sums& sums, const Warp& warp, float* staged, int pitch, int chunk) {
#pragma unroll
  for (int s = 0; s < CHUNK; ++s)
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = tile * 8 + warp.lane % 4 * 2 + i % 2;
        const int output = (chunk * CHUNK + s) * 16 + warp.lane / 4 + i / 2 * 8;
        if (row < warp.arguments.num_rows)
          staged[(warp.index * warp.arguments.num_rows + row) * pitch + output] = sums.of[s][tile][i];
      }
}

// Sums of all warps, scaled, and what becomes of them, to `out`.
static __device__ __forceinline__ void write_results(const Arguments& arguments, const float* staged, int pitch,
                                                     int thread) {
  const int outputs = arguments.strips * 16 / (arguments.is_gated ? 2 : 1), quads = outputs / 4;
  for (int spot = thread; spot < arguments.num_rows * quads; spot += 32 * WARPS) {
    const int row = spot / quads, of_output = spot % quads * 4, column = blockIdx.x * outputs + of_output;
    const int count = arguments.num_outputs - column;
    if (count <= 0) continue;
    float results[2][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (part > arguments.is_gated) break;
      float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int warp = 0; warp < WARPS; ++warp) {
        const float4 one = *reinterpret_cast<const float4*>(
            staged + (warp * arguments.num_rows + row) * pitch + part * outputs + of_output);
        all.x += one.x, all.y += one.y, all.z += one.z, all.w += one.w;
      }
      const float sums[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = min(column + i, arguments.num_outputs - 1) + part * arguments.num_outputs;
        const float factor = arguments.row_scales == nullptr ? 1.0f : __ldg(arguments.row_scales + output);
        const float bias = arguments.bias == nullptr ? 0.0f : constant_number(arguments.bias, output);
        results[part][i] = sums[i] * factor + bias;
      }
    }
    if (arguments.is_gated) {
#pragma unroll
      for (int i = 0; i < 4; ++i) results[0][i] = silu(results[0][i]) * results[1][i];
    }
    const long long place = row * arguments.out_stride + column;
    if (arguments.adds) add_stored(results[0], arguments.out, place, arguments.is_wide, arguments.is_even, count);
    store(results[0], arguments.out, place, arguments.is_wide, arguments.is_even, count);
  }
}

// Grid: programs, each of `strips` strips.
extern "C" __global__ void __launch_bounds__(32 * WARPS, PROGRAMS)
hopper_few(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int thread = threadIdx.x, index = thread / 32, lane = thread % 32;
  const int most_blocks = (arguments.num_blocks + WARPS - 1) / WARPS;
  const int own_blocks = (arguments.num_blocks + WARPS - 1 - index) / WARPS;
  const int num_chunks = arguments.strips / CHUNK, turns = own_blocks * num_chunks;
  const int x_bytes = arguments.num_rows * X_PITCH;
  const u32 base = shared_address(shared), x_at = base + WARPS * NUM_SLOTS * SLOT_BYTES;
  const u32 nothing = x_at + (STREAMS ? 0 : WARPS * most_blocks * x_bytes);
  float* staged = reinterpret_cast<float*>(shared + (nothing - base) + 16);
  const int pitch = arguments.strips * 16 + SUM_PAD;
  const Warp warp{arguments, base + index * NUM_SLOTS * SLOT_BYTES, x_at + index * most_blocks * x_bytes, nothing, lane, index};
  if (thread == 0) *reinterpret_cast<uint4*>(shared + (nothing - base)) = make_uint4(0, 0, 0, 0);
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  const u64 once = cache_policy_first(), often = cache_policy_last();
  Place ahead{0, index, 0}, place{0, index, 0};
#pragma unroll
  for (int slot = 0; slot < NUM_SLOTS; ++slot)
    if (slot < turns) {
      warp.copy_words(ahead, slot, once);
      warp.next(ahead);
    }
  // What x and `out` hold comes from the kernels before; words and scales do not.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if constexpr (STREAMS) {
#pragma unroll
    for (int slot = 0; slot < NUM_SLOTS; ++slot) {
      if (slot < turns) warp.copy_x(index + slot * WARPS, warp.slot_x(slot), often);
      commit_copies();
    }
  } else {
    for (int i = 0; i < own_blocks; ++i) warp.copy_x(index + i * WARPS, warp.all_x + i * x_bytes, often);
#pragma unroll
    for (int slot = 0; slot < NUM_SLOTS; ++slot) commit_copies();
  }
  __syncthreads();

  Sums sums;
  sums.clear();
  int slot = 0;
  for (int turn = 0; turn < turns; ++turn) {
    wait_copies<NUM_SLOTS - 1>();
    __syncwarp();
    multiply_block(sums, warp, shared, base, slot, STREAMS ? warp.slot_x(slot) : warp.all_x + place.index * x_bytes);
    __syncwarp();
    if (turn + NUM_SLOTS < turns) {
      warp.copy_words(ahead, slot, once);
      if constexpr (STREAMS) warp.copy_x(ahead.block, warp.slot_x(slot), often);
      warp.next(ahead);
    }
    commit_copies();
    if (++slot == NUM_SLOTS) slot = 0;
    const int chunk = place.chunk;
    warp.next(place);
    if (place.chunk != chunk) {
      stage(sums, warp, staged, pitch, chunk);
      sums.clear();
    }
  }
  if (turns == 0)
    for (int chunk = 0; chunk < num_chunks; ++chunk) stage(sums, warp, staged, pitch, chunk);
  __syncthreads();
  write_results(arguments, staged, pitch, thread);
}
