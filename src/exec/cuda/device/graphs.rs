//! Graphs of a GPU: work that was captured from a stream once and is started with one call.

use super::super::driver::Graph;
use cudarc::driver::{DriverError, result, sys};

/// By number; what was forgotten leaves its place empty.
#[derive(Default)]
pub struct Graphs {
    held: Vec<Option<sys::CUgraphExec>>,
}

impl Graphs {
    /// Captures what `start` puts on the stream.
    ///
    /// # Safety
    /// The context is current, the stream alive and not being captured; memory and modules that the work names outlive the graph.
    pub unsafe fn record<E: From<DriverError>>(
        &mut self,
        stream: sys::CUstream,
        start: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        // Other threads of the process go on as they like.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: as the caller promises.
        unsafe { result::stream::begin_capture(stream, mode) }?;
        let started = start();
        // SAFETY: also after a failure the capture must end; an invalidated one gives no graph.
        let captured = unsafe { result::stream::end_capture(stream) };
        let discard = |graph: sys::CUgraph| {
            if !graph.is_null() {
                // SAFETY: made by `end_capture` and not used again.
                let _ = unsafe { result::graph::destroy(graph) };
            }
        };
        if let Err(error) = started {
            captured.into_iter().for_each(discard);
            return Err(error);
        }
        let graph = captured?;
        // SAFETY: the graph was captured whole.
        let made = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        discard(graph);
        let made = made?;
        self.held.push(Some(made));
        // The first start is then as fast as the others.
        // SAFETY: the graph was just made.
        unsafe { result::graph::upload(made, stream) }?;
        Ok(Graph(self.held.len() - 1))
    }

    pub fn get(&self, graph: Graph) -> Option<sys::CUgraphExec> {
        self.held.get(graph.0).copied().flatten()
    }

    pub fn take(&mut self, graph: Graph) -> Option<sys::CUgraphExec> {
        self.held.get_mut(graph.0).and_then(Option::take)
    }

    /// # Safety
    /// The context is current and no graph is running.
    pub unsafe fn free(&mut self) {
        for graph in self.held.drain(..).flatten() {
            // SAFETY: made in `record`, destroyed once.
            let _ = unsafe { result::graph::exec_destroy(graph) };
        }
    }
}
