//! A tiny training loop: fits a polynomial by gradient descent, saves asynchronously, can be killed at any moment and resumes
//! from the latest step, keeps the latest and the best three, and on SIGTERM saves once more and ends.
//!
//!     cargo run --release --features cli --example training_loop -- /tmp/touchdown-training
//!
//! Kill it (`kill -9`, or `kill` for SIGTERM) and run it again. What it keeps: `touchdown steps /tmp/touchdown-training`. How many
//! steps it trains can be given as a second argument.

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use touchdown::training::{
    Checkpointer, CheckpointerOptions, PreservationPolicy, SavePolicy, StepChoice, StepOptions, StepSave,
    flag_on_sigterm,
};
use touchdown::tree::save::NewArray;
use touchdown::{Result, State, Tree};

/// The model: coefficients of a polynomial, and their momentum.
struct Model {
    weights: Vec<f64>,
    momentum: Vec<f64>,
}

impl Model {
    fn new() -> Self {
        Self { weights: vec![0.0; 6], momentum: vec![0.0; 6] }
    }

    /// The model of a loaded step.
    fn from_state(state: &State) -> Result<Self> {
        let values = |path| -> Result<Vec<f64>> { Ok(state.array(path)?.shards()[0].as_slice::<f64>()?.to_vec()) };
        Ok(Self { weights: values("params/weights")?, momentum: values("opt/momentum")? })
    }

    /// What is saved: a snapshot, which the loop does not change any more.
    fn to_tree(&self, step: u64) -> Tree {
        let array = |values: &[f64]| NewArray::from_vec(&[values.len() as u64], values.to_vec());
        let tree = Tree::new().with("params/weights", array(&self.weights));
        tree.with("opt/momentum", array(&self.momentum)).with("step", step)
    }

    /// One step of gradient descent on points of a sine; the loss before it.
    fn train(&mut self, step: u64) -> f64 {
        let mut gradient = vec![0.0; self.weights.len()];
        let mut loss = 0.0;
        for point in 0..32 {
            // Other points every step, so that the loss goes up and down.
            let x = ((point as f64 + step as f64 * 0.37).sin() * 3.0).clamp(-3.0, 3.0) / 3.0;
            let powers: Vec<f64> = (0..self.weights.len()).map(|power| x.powi(power as i32)).collect();
            let y: f64 = self.weights.iter().zip(&powers).map(|(weight, power)| weight * power).sum();
            let error = y - (3.0 * x).sin();
            loss += error * error / 32.0;
            gradient.iter_mut().zip(&powers).for_each(|(gradient, power)| *gradient += error * power / 16.0);
        }
        for ((weight, momentum), gradient) in self.weights.iter_mut().zip(&mut self.momentum).zip(gradient) {
            *momentum = 0.9 * *momentum + gradient;
            *weight -= 0.02 * *momentum;
        }
        loss
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let root = arguments.next().unwrap_or_else(|| "touchdown-training".into());
    let last = arguments.next().and_then(|last| last.parse().ok()).unwrap_or(3_000);
    // The library installs no handler by itself; this one sets a flag.
    let stop = flag_on_sigterm()?;
    run(&root, last, &stop)
}

/// Trains from the latest step to this one, or until it is told to stop.
pub(crate) fn run(root: &str, last: u64, stop: &Arc<AtomicBool>) -> Result<()> {
    let options = CheckpointerOptions {
        save_policy: SavePolicy::any([SavePolicy::interval(20), SavePolicy::OnSignal(Arc::clone(stop))]),
        preservation: PreservationPolicy::any([PreservationPolicy::latest(1), PreservationPolicy::best(3, "-loss")]),
        custom_metadata: Some(serde_json::json!({"model": "polynomial of degree 5"})),
        ..CheckpointerOptions::default()
    };
    let steps = Checkpointer::open(root, options)?;
    let (mut model, start) = match steps.latest()? {
        Some(step) => (Model::from_state(&steps.load(StepChoice::Latest)?)?, step.step + 1),
        None => (Model::new(), 0),
    };
    println!("starting at step {start}");
    for step in start..=last {
        let loss = model.train(step);
        // Asked once, and first: what comes after this is heard at the next step.
        let ends = stop.load(Ordering::Acquire);
        // A no-op but for every 20th step. The tree is a snapshot: training goes on while it is written.
        if ends || steps.should_save(step) {
            let save = steps.save_async(step, &model.to_tree(step), &StepOptions::metric("loss", loss))?;
            println!("step {step}: loss {loss:.5}");
            if ends {
                match save.map(StepSave::wait).transpose()? {
                    Some(_) => println!("asked to stop: saved step {step}"),
                    None => println!("asked to stop: {}", steps.why_not(step).unwrap_or_default()),
                }
                break;
            }
        }
        // The work that a real step is.
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    steps.wait()?;
    let kept: Vec<u64> = steps.steps().iter().map(|step| step.step).collect();
    let best = steps.best("-loss")?.map(|step| step.step);
    println!("kept {kept:?}, best {best:?}");
    steps.close()
}
