//! Every interleaving of the staging memory's users, under loom: credits, slots, and the pipeline that they make.
//!
//! The pipeline stands for the engine: a driver admits work in order and waits only for completions, a reader fills slots,
//! a worker decodes into a slot of its own. The budget, the ring and their guards are the real ones.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --lib --release loom_`

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use loom::sync::mpsc::{Receiver, Sender, channel};
use loom::thread;

use super::budget::{Budget, Credit};
use super::ring::{Ring, Slot};
use super::sync::{AtomicU64, Ordering};

/// Explores interleavings with at most so many preemptions, which finds what two or three threads can do to each other,
/// and says how many there were.
fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        counted.fetch_add(1, SeqCst);
        model();
    });
    println!("{} interleavings", count.load(SeqCst));
    assert!(count.load(SeqCst) > 1, "nothing was interleaved");
}

/// The bytes that are out, counted beside the budget by those who hold them.
fn hold(out: &AtomicU64, credit: Option<Credit>, bytes: u64, total: u64) -> bool {
    let Some(credit) = credit else { return false };
    assert!(out.fetch_add(bytes, Ordering::SeqCst) + bytes <= total, "more credits are out than there are");
    out.fetch_sub(bytes, Ordering::SeqCst);
    drop(credit);
    true
}

#[test]
fn loom_credits_never_pass_the_total_whoever_takes_them() {
    explore(3, || {
        let (budget, out) = (Budget::new(10), Arc::new(AtomicU64::new(0)));
        let takers: Vec<_> = [6, 6]
            .map(|bytes| {
                let (budget, out) = (Arc::clone(&budget), Arc::clone(&out));
                thread::spawn(move || hold(&out, budget.take(bytes), bytes, 10))
            })
            .into();
        let own = hold(&out, budget.take(4), 4, 10);
        let taken = takers.into_iter().map(|taker| taker.join().unwrap()).filter(|took| *took).count();
        assert!(own || taken > 0, "everybody was refused");
        assert!(budget.peak() <= 10 && budget.peak() >= 4);
        assert!(budget.take(10).is_some(), "credits did not come back");
    });
}

#[test]
fn loom_slots_have_one_holder_and_all_come_back() {
    explore(3, || {
        let ring = Ring::new(8);
        // Two users of two slots at most: however they meet, a third buffer is never needed.
        let use_one = |ring: &Arc<Ring>, mark: u8| {
            let mut slot = ring.slot().unwrap();
            assert_eq!(slot.len(), 8);
            slot.fill(mark);
            thread::yield_now();
            assert!(slot.iter().all(|byte| *byte == mark), "somebody else has written into a slot that is held");
        };
        let users: Vec<_> = [1, 2]
            .map(|mark| {
                let ring = Arc::clone(&ring);
                thread::spawn(move || (0..2).for_each(|round| use_one(&ring, mark + 10 * round)))
            })
            .into();
        users.into_iter().for_each(|user| user.join().unwrap());
        let free = ring.free_count();
        assert!((1..=2).contains(&free), "{free} slots came back of at most two");
    });
}

/// Work on its way: the stored bytes, and the credit that covers them.
struct Piece {
    number: u8,
    slot: Slot,
    credit: Credit,
}

/// What wakes the driver.
struct Woken;

/// How many pieces a pipeline is given.
const PIECES: u8 = 3;

#[test]
fn loom_a_pipeline_ends_whatever_the_order_of_completions() {
    explore(4, || {
        // Room for one piece: the next is admitted only when the one before has been decoded.
        let (budget, ring) = (Budget::new(8), Ring::new(8));
        let (to_reader, reads) = channel::<Piece>();
        let (to_worker, filled) = channel::<Piece>();
        let (wake, woken) = channel::<Woken>();
        let reader = thread::spawn(move || read(reads, to_worker));
        let scratch = Arc::clone(&ring);
        let worker = thread::spawn(move || decode(filled, &scratch, wake));
        let mut next = 0;
        let mut at_work = 0;
        while next < PIECES || at_work > 0 {
            match budget.take(8) {
                Some(credit) if next < PIECES => {
                    to_reader.send(Piece { number: next, slot: ring.slot().unwrap(), credit }).unwrap();
                    next += 1;
                    at_work += 1;
                }
                // No memory or no more work: only a completion can change that. loom reports a wait without end.
                refused => {
                    drop(refused);
                    assert!(at_work > 0, "work waits for memory that nobody holds");
                    woken.recv().unwrap();
                    at_work -= 1;
                }
            }
        }
        drop(to_reader);
        reader.join().unwrap();
        assert_eq!(worker.join().unwrap(), (0..PIECES).map(u64::from).sum::<u64>());
        assert!(budget.peak() == 8 && budget.take(8).is_some(), "credits did not come back");
        assert_eq!(ring.free_count(), 2, "one slot to read into and one to decode into are all that it takes");
    });
}

/// The reader's thread: reading.
fn read(reads: Receiver<Piece>, to_worker: Sender<Piece>) {
    // loom's receiver panics where std's says that all senders are gone, so the number of pieces is known.
    for _ in 0..PIECES {
        let mut piece = reads.recv().unwrap();
        piece.slot.fill(piece.number);
        to_worker.send(piece).unwrap();
    }
}

/// A worker: decoding into its own slot, copying from there.
fn decode(filled: Receiver<Piece>, ring: &Arc<Ring>, wake: Sender<Woken>) -> u64 {
    let mut sum = 0;
    for _ in 0..PIECES {
        let Piece { number, slot, credit } = filled.recv().unwrap();
        let mut decoded = ring.slot().unwrap();
        decoded.copy_from_slice(&slot);
        thread::yield_now();
        assert!(slot.iter().chain(decoded.iter()).all(|byte| *byte == number), "a slot was reused while it was held");
        sum += u64::from(decoded[0]);
        // Memory goes back before the driver hears of it: it asks once for every word, not again and again.
        drop((slot, decoded, credit));
        wake.send(Woken).unwrap();
    }
    sum
}
