// What the kernels for Hopper that multiply by packed weights share: how words become numbers, and where a copy leaves
// them. `packed_weights` describes the layout. Macros:
//   SLICE         words of a row in a block: 64 or 32
//   VALUES        numbers in a word: 4 or 2
//   GROUPS        groups of a block with a scale each: 1, 2 or 4; 0: there are none
//   SCALE         of a group: FLOAT32, BFLOAT16, FLOAT16 or E4M3
//   ZERO_BYTES    of a block's zero points of one row; 0: there are none
//   BF16          activations are bfloat16 rather than float16
//   UNPACK_0 to UNPACK_3  PTX that makes two words two numbers: %0 of %1, with the zero points %2
//
// hopper.cuh stands before it.

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2
#define E4M3 3

constexpr int BLOCK = SLICE * VALUES;         // columns
constexpr int STEPS = SLICE / 16;             // of 16 words
constexpr int SCALE_BYTES = SCALE == FLOAT32 ? 4 : SCALE == E4M3 ? 1 : 2;
constexpr int PER_GROUP = GROUPS > 0 ? VALUES / GROUPS : VALUES;

#if ZERO_BYTES > 4
typedef u64 Zero;
#define ZERO_OPERAND "l"
#else
typedef u32 Zero;
#define ZERO_OPERAND "r"
#endif

static __device__ __forceinline__ void load_matrices(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// Value INDEX of two words as two numbers.
template <int INDEX>
static __device__ __forceinline__ u32 unpacked(u32 words, Zero zero) {
  u32 numbers;
  if constexpr (INDEX == 0) asm(UNPACK_0 : "=r"(numbers) : "r"(words), ZERO_OPERAND(zero));
  if constexpr (INDEX == 1) asm(UNPACK_1 : "=r"(numbers) : "r"(words), ZERO_OPERAND(zero));
#if VALUES == 4
  if constexpr (INDEX == 2) asm(UNPACK_2 : "=r"(numbers) : "r"(words), ZERO_OPERAND(zero));
  if constexpr (INDEX == 3) asm(UNPACK_3 : "=r"(numbers) : "r"(words), ZERO_OPERAND(zero));
#endif
  return numbers;
}

// Where the copy leaves 16 bytes of a row of words: the hardware permutes them so that eight rows meet no bank twice.
static __device__ __forceinline__ u32 swizzled(int row, int chunk) {
  if (SLICE == 64) return row * 128 + ((chunk ^ (row & 7)) << 4);
  return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4);
}
