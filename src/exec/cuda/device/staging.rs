//! Memory of the host that the GPU copies from by itself: what is written there is on its way while the host goes on.

use super::super::driver::STAGE;
use cudarc::driver::{DriverError, result, sys};
use std::ffi::c_void;

/// Writes do not straddle these bytes; what a driver copies best.
const ALIGNMENT: usize = 256;

/// Two halves of page-locked memory, filled in turn: a half is filled anew when its copies are done.
pub struct Staging {
    memory: *mut c_void,
    /// Recorded behind the last copy out of each half.
    copied: [sys::CUevent; 2],
    half: usize,
    /// Bytes of the half that are taken.
    taken: usize,
}

impl Staging {
    /// # Safety
    /// The context must be current, here and wherever else it is used.
    pub unsafe fn new() -> Result<Staging, DriverError> {
        // SAFETY: all of what is allocated is written at once.
        let memory = unsafe {
            let memory = result::malloc_host(2 * STAGE, 0)?;
            memory.cast::<u8>().write_bytes(0, 2 * STAGE);
            memory
        };
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        match event().and_then(|first| Ok([first, event()?])) {
            Ok(copied) => Ok(Staging { memory, copied, half: 0, taken: 0 }),
            Err(error) => {
                // SAFETY: allocated above.
                let _ = unsafe { result::free_host(memory) };
                Err(error)
            }
        }
    }

    /// Puts what `fill` writes on its way to `to`.
    ///
    /// # Safety
    /// The context is current, the stream alive, always the same, and not being captured; `to` has room for `bytes`.
    pub unsafe fn send(
        &mut self,
        stream: sys::CUstream,
        to: sys::CUdeviceptr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), DriverError> {
        assert!(bytes <= STAGE, "{bytes} bytes at a time");
        if self.taken + bytes > STAGE {
            // SAFETY: events live as long as `self`.
            unsafe { result::event::record(self.copied[self.half], stream) }?;
            (self.half, self.taken) = (1 - self.half, 0);
            // SAFETY: as above; an event that was never recorded is done.
            unsafe { result::event::synchronize(self.copied[self.half]) }?;
        }
        // SAFETY: inside this half of the memory, which nothing else refers to: copies that read it are done.
        let part = unsafe {
            let start = self.memory.cast::<u8>().add(self.half * STAGE + self.taken);
            std::slice::from_raw_parts_mut(start, bytes)
        };
        fill(part);
        self.taken += bytes.next_multiple_of(ALIGNMENT);
        // SAFETY: the part is not written again before the event behind this copy.
        unsafe { result::memcpy_htod_async(to, part, stream) }
    }

    /// # Safety
    /// The context is current and all copies are done.
    pub unsafe fn free(self) {
        // SAFETY: made in `new`.
        unsafe {
            let _ = result::free_host(self.memory);
            for event in self.copied {
                let _ = result::event::destroy(event);
            }
        }
    }
}
