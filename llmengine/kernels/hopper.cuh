// What the kernels for Hopper (compute capability 9.0) share: barriers, copies by the bulk copy engine, operands of
// `wgmma` in shared memory, numbers of 16 bits. Macro BF16: those are bfloat16 rather than float16.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

static __device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

static __device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

static __device__ __forceinline__ u64 cache_policy_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

static __device__ __forceinline__ u64 cache_policy_last() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

static __device__ __forceinline__ void copy_box(u32 target, const TensorMap* map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

static __device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Four numbers of 32 bits at the same place of another program's shared memory.
template <typename Number>
static __device__ __forceinline__ void load_of_peer(Number (&numbers)[4], u32 address, int rank) {
  u32 there;
  u32 bits[4];
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(there)
               : "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) numbers[i] = *reinterpret_cast<Number*>(&bits[i]);
}

template <typename Number>
static __device__ __forceinline__ void load_shared(Number (&numbers)[4], u32 address) {
  u32 bits[4];
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(address)
               : "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) numbers[i] = *reinterpret_cast<Number*>(&bits[i]);
}

static __device__ __forceinline__ u32 halves(float value) {
  u32 pair;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
#endif
  return pair;
}

static __device__ __forceinline__ float widened(u16 bits, bool is_bf16) {
  float value;
  if (is_bf16)
    value = __uint_as_float(static_cast<u32>(bits) << 16);
  else
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// N numbers of 16 bits.
template <int N>
struct PackedNumbers {
  typedef u32 type;
};
template <>
struct PackedNumbers<4> {
  typedef u64 type;
};
template <int N>
using Packed = typename PackedNumbers<N>::type;

// Of a box of x: K-major, swizzled over 128 bytes, eight rows 1,024 bytes apart.
static __device__ __forceinline__ u64 box_descriptor(u32 address) {
  return static_cast<u64>((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

template <int SLOTS>
struct Turn {
  int slot = 0;
  u32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

static __device__ __forceinline__ float number(const void* numbers, long long index) {
  return widened(static_cast<const u16*>(numbers)[index], BF16);
}

// The same of numbers that no kernel writes, which may be read early.
static __device__ __forceinline__ float constant_number(const void* numbers, long long index) {
  return widened(__ldg(static_cast<const u16*>(numbers) + index), BF16);
}

// An exact division is 20 instructions.
static __device__ __forceinline__ float silu(float value) { return __fdividef(value, 1.0f + __expf(-value)); }

// Four numbers of which `count` exist, from `index` on, which no kernel writes: read early, and together where they can be.
static __device__ __forceinline__ void load_constants(float (&values)[4], const float* numbers, long long index, int count) {
  if (count >= 4 && (reinterpret_cast<u64>(numbers + index) & 15) == 0) {
    const float4 all = __ldg(reinterpret_cast<const float4*>(numbers + index));
    values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = i < count ? __ldg(numbers + index + i) : 0.0f;
  }
}

// The same of numbers of 16 bits.
static __device__ __forceinline__ void load_constants(float (&values)[4], const void* numbers, long long index, int count) {
  const u16* first = static_cast<const u16*>(numbers) + index;
  if (count >= 4 && (reinterpret_cast<u64>(first) & 7) == 0) {
    const u64 all = __ldg(reinterpret_cast<const u64*>(first));
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = widened(static_cast<u16>(all >> (16 * i)), BF16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = i < count ? constant_number(numbers, index + i) : 0.0f;
  }
}

// N results beside each other, 4 or 2, of which `count` exist; together if `is_even`, where addresses allow it.
template <int N>
static __device__ __forceinline__ void add_stored(float (&values)[N], const void* out, long long index, bool is_wide,
                                                  bool is_even, int count) {
  if (is_wide) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) values[i] += static_cast<const float*>(out)[index + i];
  } else if (is_even) {
    const Packed<N> all = *reinterpret_cast<const Packed<N>*>(static_cast<const u16*>(out) + index);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += widened(static_cast<u16>(all >> (16 * i)), BF16);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) values[i] += number(out, index + i);
  }
}

template <int N>
static __device__ __forceinline__ void store(const float (&values)[N], void* out, long long index, bool is_wide,
                                             bool is_even, int count) {
  if (is_wide) {
    float* target = static_cast<float*>(out) + index;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      if (is_even) {
        *reinterpret_cast<float2*>(target + i) = make_float2(values[i], values[i + 1]);
      } else {
        if (i < count) target[i] = values[i];
        if (i + 1 < count) target[i + 1] = values[i + 1];
      }
    }
  } else if (is_even) {
    Packed<N> all = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) all |= static_cast<Packed<N>>(halves(values[i]) & 0xffff) << (16 * i);
    *reinterpret_cast<Packed<N>*>(static_cast<u16*>(out) + index) = all;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) static_cast<u16*>(out)[index + i] = static_cast<u16>(halves(values[i]));
  }
}

// Where results go.
struct Target {
  void* out;
  long long out_stride;
  int num_rows, num_outputs;
  int adds;      // results are added to what is there
  int is_wide;   // float32
  int is_even;   // four in a row can be written at once
  int is_gated;  // silu of one product times another is written
};

// Sums of a tile that programs of a cluster hold parts of, in shared memory as [row][output]; each has some rows to write.
template <typename Sum>
struct Staged {
  u32 base;
  int pitch;       // numbers from one row to the next
  int split, num_splits;
  int rows;        // of a program
  int outputs;     // results in a row

  // SPOTS of four at once: reads of other programs' sums take long, and those of what is added to cannot pass the writes before
  // them. `at` says where in its row the sum of an output lies, of gates or of what they multiply, and `terms` what sums
  // are multiplied by and what is added. Few warps do this, so each instruction counts.
  template <int SPOTS, typename At, typename Terms>
  __device__ __forceinline__ void write(const Target& target, int first_row, int first_output, const At& at,
                                        const Terms& terms, int thread) const {
    constexpr int THREADS = 256;
    const int own_row = split * rows, end_row = min(rows, target.num_rows - first_row - own_row);
    const int quads = outputs / 4, row_step = THREADS / quads, quad_step = THREADS - row_step * quads;
    int next_row = thread / quads, next_quad = thread - next_row * quads;
    while (next_row < end_row) {
      float results[SPOTS][2][4];
      bool exists[SPOTS];
      long long places[SPOTS];
      int of_rows[SPOTS], of_outputs[SPOTS], counts[SPOTS];
#pragma unroll
      for (int b = 0; b < SPOTS; ++b) {
        of_rows[b] = own_row + min(next_row, rows - 1);
        of_outputs[b] = next_quad * 4;
        counts[b] = target.num_outputs - first_output - of_outputs[b];
        exists[b] = next_row < end_row && counts[b] > 0;
        places[b] = (first_row + of_rows[b]) * target.out_stride + first_output + of_outputs[b];
        next_row += row_step;
        next_quad += quad_step;
        if (next_quad >= quads) {
          next_quad -= quads;
          ++next_row;
        }
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (part > target.is_gated) break;
        Sum all[SPOTS][4] = {};
        if (num_splits == 1) {
#pragma unroll
          for (int b = 0; b < SPOTS; ++b)
            load_shared(all[b], base + (of_rows[b] * pitch + at(of_outputs[b], part)) * 4);
        } else {
          for (int other = 0; other < num_splits; ++other) {
            Sum sums[SPOTS][4];
#pragma unroll
            for (int b = 0; b < SPOTS; ++b)
              load_of_peer(sums[b], base + (of_rows[b] * pitch + at(of_outputs[b], part)) * 4, other);
#pragma unroll
            for (int b = 0; b < SPOTS; ++b)
#pragma unroll
              for (int i = 0; i < 4; ++i) all[b][i] += sums[b][i];
          }
        }
#pragma unroll
        for (int b = 0; b < SPOTS; ++b) {
#pragma unroll
          for (int i = 0; i < 4; ++i) results[b][part][i] = static_cast<float>(all[b][i]);
          if (exists[b])
            terms(results[b][part], first_row + of_rows[b],
                  first_output + of_outputs[b] + part * target.num_outputs, counts[b]);
        }
      }
      if (target.is_gated) {
#pragma unroll
        for (int b = 0; b < SPOTS; ++b)
#pragma unroll
          for (int i = 0; i < 4; ++i) results[b][0][i] = silu(results[b][0][i]) * results[b][1][i];
      }
      if (target.adds) {
#pragma unroll
        for (int b = 0; b < SPOTS; ++b)
          if (exists[b])
            add_stored(results[b][0], target.out, places[b], target.is_wide, target.is_even, counts[b]);
      }
#pragma unroll
      for (int b = 0; b < SPOTS; ++b)
        if (exists[b]) store(results[b][0], target.out, places[b], target.is_wide, target.is_even, counts[b]);
    }
  }
};
