// embed: the first kernel of a step. Resolves which token stands at which position in each row, from what the host uploaded
// (prefill) or from the slot that the sampler advanced (decode), and gathers the token's embedding.
//
// Sums the squares of 64 neighbours, eight threads together, for the norm in the product that comes next in decode.
//
// Grid: one block per row; vectors of 8. A padding row gets position -1 and zeros. A token outside of the vocabulary is a
// bug of whoever made it: its row is NaN, so that it cannot pass unnoticed.
#include "kernel.cuh"

KERNEL(embed, EmbedParams, EMBED_THREADS) {
  pdl_launch_dependents();
  pdl_wait();
  const int row = block_x();
  int token = 0, position = -1;
  if (p.prompt_token) {
    token = p.prompt_token[row];
    position = p.prompt_position[row];
  } else {
    const SlotState& slot = p.slots[p.row_slot[row]];
    if (slot_runs(slot)) {
      token = slot.last_token;
      position = slot.length - 1;
    }
  }
  if (thread_idx() == 0) p.row_position[row] = position;

  const bool known = token >= 0 && token < p.vocab;
  const uint32_t constant = known ? 0 : 0x7fc07fc0;  // zeros or NaNs
  for (int first = 0; first < p.hidden; first += EMBED_THREADS * 8) {
    const int i = first + thread_idx() * 8;
    Bf16x8 v = {{constant, constant, constant, constant}};
    if (known && position >= 0 && i < p.hidden) v = load8(p.table + (int64_t)token * p.hidden + i);
    if (i < p.hidden) store8(p.out + (int64_t)row * p.hidden + i, v);
    if (p.squares) {
      float x[8], sum = 0.f;
      unpack8(v, x);
      UNROLL for (int j = 0; j < 8; j++) sum += x[j] * x[j];
      UNROLL for (int m = 1; m < 8; m *= 2) sum += shfl_xor(sum, m);
      if (i % 64 == 0 && i < p.hidden) p.squares[(int64_t)row * (p.hidden / 64) + i / 64] = sum;
    }
  }
}
