//! The loop of the runner thread: launches steps while the device works on earlier ones, and hands results back in order.
//! Knows neither plans nor tensors.

use std::sync::mpsc::{Receiver, Sender};

use spark_backend::Result;

/// Something that runs steps, several at once.
pub(crate) trait Steps {
    /// What a step is made of.
    type Work;
    /// What it gives.
    type Output;

    /// Most steps between `launch` and `collect`; at least 1.
    fn most_in_flight(&self) -> usize;

    /// Starts a step behind those that are in flight.
    ///
    /// # Errors
    /// Device failure: nothing can be run any more.
    fn launch(&mut self, work: Self::Work) -> Result<()>;

    /// Waits for the oldest step in flight.
    ///
    /// # Errors
    /// As for `launch`.
    fn collect(&mut self) -> Result<Self::Output>;
}

/// What the engine thread asks of the runner thread.
pub(crate) enum Order<Work> {
    /// Start this step.
    Launch(Work),
    /// No further step can be planned before that many results, counted from the start, are there.
    Await(u64),
}

/// Follows the orders until the engine hangs up or a step fails; the failure is the last result.
///
/// A result is collected when no further step may be launched beside it, or when the engine says that it waits: a
/// runner that went to wait by itself would not see the step that the engine sends a moment later.
pub(crate) fn run_steps<S: Steps>(
    mut steps: S,
    orders: &Receiver<Order<S::Work>>,
    results: &Sender<Result<S::Output>>,
) {
    let most = steps.most_in_flight().max(1) as u64;
    let (mut num_launched, mut num_collected) = (0u64, 0u64);
    while let Ok(order) = orders.recv() {
        let wanted = match order {
            Order::Launch(work) => {
                if let Err(error) = steps.launch(work) {
                    // If the engine is gone, nobody is left to be told.
                    let _ = results.send(Err(error));
                    return;
                }
                num_launched += 1;
                (num_launched + 1).saturating_sub(most)
            }
            Order::Await(wanted) => wanted.min(num_launched),
        };
        while num_collected < wanted {
            let result = steps.collect();
            let failed = result.is_err();
            if results.send(result).is_err() || failed {
                return;
            }
            num_collected += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::mpsc::{channel, sync_channel},
        thread,
    };

    use spark_backend::Error;

    use super::*;

    /// Says in `log` what happens; a step's result is its own number.
    struct Fake {
        most: usize,
        in_flight: VecDeque<u32>,
        log: Sender<String>,
        fails_at: Option<u32>,
    }

    impl Steps for Fake {
        type Work = u32;
        type Output = u32;

        fn most_in_flight(&self) -> usize {
            self.most
        }

        fn launch(&mut self, work: u32) -> Result<()> {
            assert!(self.in_flight.len() < self.most, "more steps in flight than allowed");
            if self.fails_at == Some(work) {
                return Err(Error::Device { op: "launch", message: format!("step {work}") });
            }
            self.log.send(format!("launch {work}")).unwrap();
            self.in_flight.push_back(work);
            Ok(())
        }

        fn collect(&mut self) -> Result<u32> {
            let step = self.in_flight.pop_front().expect("only what was launched is collected");
            self.log.send(format!("collect {step}")).unwrap();
            Ok(step)
        }
    }

    /// What was done, in order, and the results (an error is its text).
    fn run(most: usize, fails_at: Option<u32>, orders: Vec<Order<u32>>) -> (Vec<String>, Vec<String>) {
        let (log, logged) = channel();
        let (work, queue) = channel();
        let (results, result_queue) = channel();
        orders.into_iter().for_each(|order| work.send(order).unwrap());
        drop(work);
        run_steps(Fake { most, in_flight: VecDeque::new(), log, fails_at }, &queue, &results);
        drop(results);
        let results = result_queue.iter().map(|result| match result {
            Ok(step) => step.to_string(),
            Err(error) => error.to_string(),
        });
        (logged.iter().collect(), results.collect())
    }

    #[test]
    fn the_next_step_is_launched_before_the_last_is_collected() {
        let orders = vec![
            Order::Launch(0),
            Order::Launch(1),
            Order::Await(1),
            Order::Launch(2),
            Order::Await(2),
            Order::Await(3),
        ];
        let (log, results) = run(2, None, orders);
        assert_eq!(
            log,
            ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2"],
            "one step runs while another is collected"
        );
        assert_eq!(results, ["0", "1", "2"]);
    }

    #[test]
    fn a_device_that_takes_one_step_hands_back_each_at_once() {
        let orders = vec![Order::Launch(0), Order::Launch(1), Order::Await(1), Order::Await(2)];
        let (log, _) = run(1, None, orders);
        assert_eq!(log, ["launch 0", "collect 0", "launch 1", "collect 1"]);
    }

    #[test]
    fn a_wait_for_what_was_not_launched_does_not_block() {
        assert_eq!(run(2, None, vec![Order::Await(1), Order::Launch(0), Order::Await(5)]).1, ["0"]);
    }

    #[test]
    fn a_failure_is_the_last_result() {
        let orders =
            vec![Order::Launch(0), Order::Await(1), Order::Launch(1), Order::Launch(2), Order::Await(2)];
        let (_, results) = run(2, Some(1), orders);
        assert_eq!(results.len(), 2, "{results:?}");
        assert!(results[1].contains("step 1"), "{results:?}");
    }

    #[test]
    fn an_engine_that_is_gone_ends_the_loop() {
        let (log, _logged) = channel();
        let (work, queue) = sync_channel(1);
        let (results, result_queue) = channel();
        drop(result_queue);
        let queue: Receiver<Order<u32>> = queue;
        let runner = thread::spawn(move || {
            let fake = Fake { most: 1, in_flight: VecDeque::new(), log, fails_at: None };
            run_steps(fake, &queue, &results);
        });
        work.send(Order::Launch(0)).unwrap();
        runner.join().expect("the loop ends although the sender of orders lives");
    }
}
