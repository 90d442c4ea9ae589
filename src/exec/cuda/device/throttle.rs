//! How far the host may run ahead of the GPU: far enough that the GPU never waits, near enough that progress and Ctrl-C mean something.

use cudarc::driver::{DriverError, result, sys};

/// Graphs that may be started and not done: so many are started without waiting for one before.
pub const AHEAD: usize = 4;

/// An event behind each of the last graphs.
pub struct Throttle {
    done: [sys::CUevent; AHEAD],
    next: usize,
}

impl Throttle {
    /// The context must be current, here and wherever else it is used.
    pub fn new() -> Result<Throttle, DriverError> {
        let mut done = [std::ptr::null_mut(); AHEAD];
        for event in &mut done {
            // What was made before a failure goes with the context.
            *event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        }
        Ok(Throttle { done, next: 0 })
    }

    /// Starts something on the stream once there is room for it.
    ///
    /// # Safety
    /// The context is current, the stream alive, always the same, and not being captured.
    pub unsafe fn start(
        &mut self,
        stream: sys::CUstream,
        start: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        let event = self.done[self.next];
        // SAFETY: events live as long as `self`; one that was never recorded is done.
        unsafe { result::event::synchronize(event) }?;
        start()?;
        self.next = (self.next + 1) % AHEAD;
        // SAFETY: as above.
        unsafe { result::event::record(event, stream) }
    }

    /// # Safety
    /// The context is current and the stream is done.
    pub unsafe fn free(self) {
        for event in self.done {
            // SAFETY: made in `new`, destroyed once.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}
