//! An idle backend costs nothing: its threads park. Alone in its process, so that nothing else uses time.

use std::time::{Duration, Instant};

use backend::Backend;
use cpu::{Cpu, CpuOptions};

/// Processor time of all threads of this process so far, where the system tells it.
fn process_time() -> Option<Duration> {
    let threads = std::fs::read_dir("/proc/self/task").ok()?;
    let nanoseconds = threads.map(|thread| {
        let stat = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse::<u64>().ok()
    });
    nanoseconds.sum::<Option<u64>>().map(Duration::from_nanos)
}

#[test]
fn parked_threads_use_less_than_one_percent() {
    let mut cpu = Cpu::new(CpuOptions { num_threads: Some(4), ..CpuOptions::default() });
    let rows = 512;
    let mut x = cpu.tensor(rows, 512, backend::DType::F32).unwrap();
    let y = cpu.tensor(rows, 512, backend::DType::F32).unwrap();
    (0..100).for_each(|_| cpu.add(&mut x, &y, rows));

    // Threads that are still on their way to park may take a while to get there on a busy machine, so the
    // share is measured until it is small, and a team that never parks fails by the deadline.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (start, Some(before)) = (Instant::now(), process_time()) else {
            println!("skipped: this system does not tell a process's time per thread");
            return;
        };
        std::thread::sleep(Duration::from_millis(200));
        let used = process_time().expect("it told the time before") - before;
        let share = used.as_secs_f64() / start.elapsed().as_secs_f64();
        if share < 0.01 {
            return;
        }
        assert!(Instant::now() < deadline, "an idle backend uses {:.1}% of a core", 100.0 * share);
    }
}
