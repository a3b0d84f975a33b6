// The list of tensors as it travels in a launch's parameters.
#pragma once

#include "../../types.h"

#include <cstdint>

namespace talib_fast::squared_distance {

// One tensor of the list, with its source and what belongs to them, dense.
struct Operand {
  const void* target;
  const void* source;  // null: zeros
  const void* weight;  // [channels] of the accumulation dtype; null: ones
  void* gradient;      // null in the forward pass
  int64_t elements;
  int64_t channels, inner;  // element i is of channel i / inner % channels
  Exchange exchange;        // how the source's order in memory differs from the target's
  unsigned first_block;
  uint8_t type;         // FloatType
  uint8_t source_type;  // the source's; a pair of with_pair
  bool vectors;         // all addresses suit vectors of 16 bytes of target
  uint8_t bytes_log2;   // bytes of target and source that an element has, rounded up to a power of two
};

// The operands of one launch. A launch takes 4 KB of parameters, from CUDA 12.1 on 32 KB.
template <int kOperands>
struct List {
  static constexpr int kStretches = 128;

  Operand operands[kOperands];
  int64_t chunk_bytes;  // of target and source that a block takes
  int count;
  // Blocks come in equal stretches; first_operands[i] is the operand of stretch i's first block. A block searches only
  // the operands of its stretch: each step of a search reads a parameter, at the start of a launch from memory.
  int stretch_log2;
  uint16_t first_operands[kStretches + 1];
};
constexpr int kFewOperands = 40;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kManyOperands = kFewOperands;
#else
constexpr int kManyOperands = 360;
#endif
static_assert(sizeof(Operand) == 88 && sizeof(List<kFewOperands>) < 4000 && sizeof(List<kManyOperands>) < 32600);

}  // namespace talib_fast::squared_distance
