// embed: the first kernel of a step. Resolves which token stands at which position in each row, from what the host uploaded
// (prefill) or from the slot that the sampler advanced (decode), and gathers the token's embedding.
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
    if (slot.flags & SLOT_ACTIVE) {
      token = slot.last_token;
      position = slot.length - 1;
    }
  }
  if (thread_idx() == 0) p.row_position[row] = position;

  const bool known = token >= 0 && token < p.vocab;
  const uint32_t constant = known ? 0 : 0x7fc07fc0;  // zeros or NaNs
  for (int i = thread_idx() * 8; i < p.hidden; i += EMBED_THREADS * 8) {
    Bf16x8 v = {{constant, constant, constant, constant}};
    if (known && position >= 0) v = load8(p.table + (int64_t)token * p.hidden + i);
    store8(p.out + (int64_t)row * p.hidden + i, v);
  }
}
