//! A thread of its own that encodes and writes what is finished while the next images are made: in order, and whole or not at all.

use crate::{Error, Result};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

/// Tasks that may wait while one is at work. Each holds an image; where files are slower than images, making them waits.
const AHEAD: usize = 2;

type Task = Box<dyn FnOnce() -> Result<()> + Send>;

pub struct Writer {
    queue: SyncSender<Task>,
    thread: JoinHandle<Result<()>>,
}

impl Writer {
    pub fn start() -> Result<Writer> {
        let (queue, tasks) = sync_channel::<Task>(AHEAD);
        // Its end drops the queue's other side, so that what is added after a failure is refused.
        let work = move || tasks.into_iter().try_for_each(|task| task());
        let thread = Builder::new().name("writer".into()).spawn(work);
        let failed = |error| Error::Usage(format!("cannot start a thread to write images: {error}"));
        Ok(Writer { queue, thread: thread.map_err(failed)? })
    }

    /// Queues a task, or returns whether there was one that failed: [`Writer::finish`] says how.
    pub fn add(&self, task: impl FnOnce() -> Result<()> + Send + 'static) -> bool {
        self.queue.send(Box::new(task)).is_ok()
    }

    /// Whether a task has failed.
    pub fn has_failed(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until all tasks are done; the first failure, after which none was begun.
    pub fn finish(self) -> Result<()> {
        drop(self.queue);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn tasks_run_in_order_up_to_the_first_failure() {
        let done = Arc::new(Mutex::new(vec![]));
        let note = |number: usize| {
            let done = Arc::clone(&done);
            move || {
                done.lock().unwrap().push(number);
                if number == 20 { Err(Error::Usage("the disk is full".into())) } else { Ok(()) }
            }
        };
        let writer = Writer::start().unwrap();
        assert!((0..10).all(|number| writer.add(note(number))));
        writer.finish().unwrap();
        assert_eq!(*done.lock().unwrap(), (0..10).collect::<Vec<_>>());

        let writer = Writer::start().unwrap();
        // At most so many are queued behind the one that fails.
        let accepted = (20..40).take_while(|number| writer.add(note(*number))).count();
        assert!((1..=2 + AHEAD).contains(&accepted), "{accepted}");
        while !writer.has_failed() {
            std::thread::yield_now();
        }
        assert!(!writer.add(note(40)));
        assert_eq!(writer.finish().unwrap_err().to_string(), "the disk is full");
        assert_eq!(*done.lock().unwrap().last().unwrap(), 20);
    }
}
