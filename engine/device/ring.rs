//! The ring by which tokens reach the host: the sampler writes records into mapped host memory and then releases the head; the
//! host reads the head, then the records. Neither waits for the other (kernels/params.h, TokenRing).

use super::{Device, Pinned};
use crate::Result;
use crate::kernels::params::{MAX_DECODE_ROWS, RING_STEPS, TokenRecord, TokenRing};
use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

pub struct Ring {
    memory: Pinned,
    /// Steps that have been read.
    tail: u32,
}

impl Ring {
    pub fn new(device: &Device) -> Result<Ring> {
        let memory = device.alloc_pinned(size_of::<TokenRing>())?;
        // SAFETY: TokenRing's bytes, which no kernel knows of yet; zeros are a valid TokenRing.
        unsafe { memory.host().write_bytes(0, size_of::<TokenRing>()) };
        Ok(Ring { memory, tail: 0 })
    }

    /// For SampleParams.
    pub fn pointer(&self) -> *mut TokenRing {
        self.memory.pointer()
    }

    /// Loops on the device end so many steps after those that have been read; at once, if that is none.
    pub fn run_for(&self, steps: u32) {
        assert!(steps <= RING_STEPS, "the ring holds {RING_STEPS} steps");
        // SAFETY: in the ring's memory, aligned; the device reads it as one 32-bit word.
        let until = unsafe { &*self.memory.host().add(offset_of!(TokenRing, until)).cast::<AtomicU32>() };
        until.store(self.tail.wrapping_add(steps), Ordering::Release);
    }

    /// The records of the next step, if it has completed. At most RING_STEPS steps may be in flight.
    pub fn pop(&mut self) -> Option<Vec<TokenRecord>> {
        let base = self.memory.host();
        // SAFETY: the head lies in the ring's memory, aligned; the device writes it as one 32-bit word.
        let head = unsafe { &*base.add(offset_of!(TokenRing, head)).cast::<AtomicU32>() }.load(Ordering::Acquire);
        let ready = head.wrapping_sub(self.tail);
        assert!(ready <= RING_STEPS, "the ring has overflowed");
        if ready == 0 {
            return None;
        }
        let index = (self.tail % RING_STEPS) as usize;
        // SAFETY: below the head, so the device has written these and will not until RING_STEPS steps later.
        let rows = unsafe { base.add(offset_of!(TokenRing, rows) + 4 * index).cast::<u32>().read() };
        assert!(rows <= MAX_DECODE_ROWS, "a step of {rows} rows");
        let first = offset_of!(TokenRing, records) + index * MAX_DECODE_ROWS as usize * size_of::<TokenRecord>();
        let record = |row: usize| {
            // SAFETY: as above.
            unsafe { base.add(first + row * size_of::<TokenRecord>()).cast::<TokenRecord>().read() }
        };
        self.tail = self.tail.wrapping_add(1);
        Some((0..rows as usize).map(record).collect())
    }
}
