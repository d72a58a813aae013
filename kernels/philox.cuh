// Counter-based random numbers: what is drawn depends on a key and a counter alone, not on which thread draws it, nor when.
#pragma once

#include "kernel.cuh"

// Philox 4x32-10 (Salmon et al., SC'11): four words from a 128-bit counter and a 64-bit key.
DEVICE void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
  UNROLL for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = (uint32_t)(b >> 32) ^ c1 ^ key0;
    c[1] = (uint32_t)b;
    c[2] = (uint32_t)(a >> 32) ^ c3 ^ key1;
    c[3] = (uint32_t)a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}
