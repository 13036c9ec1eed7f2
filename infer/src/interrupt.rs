//! Ctrl-C: stops what is running and keeps the program; when nothing runs, or at the second press, it ends the program.

use std::sync::atomic::{AtomicU8, Ordering};

/// Exit status of a program that Ctrl-C ended, as shells have it: 128 + SIGINT.
pub const EXIT_STATUS: i32 = 130;

const IDLE: u8 = 0;
const BUSY: u8 = 1;
const STOP: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(IDLE);

/// While it lives, the first Ctrl-C only asks for a stop.
#[derive(Debug)]
pub struct Busy(());

impl Busy {
    /// Begins something that can be stopped.
    pub fn begin() -> Self {
        static HANDLER: std::sync::Once = std::sync::Once::new();
        HANDLER.call_once(|| {
            // Where no handler can be set Ctrl-C ends the program, as it always did.
            let _ = ctrlc::set_handler(|| {
                if STATE.compare_exchange(BUSY, STOP, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                    std::process::exit(EXIT_STATUS);
                }
            });
        });
        STATE.store(BUSY, Ordering::SeqCst);
        Self(())
    }

    /// Whether Ctrl-C has been pressed.
    pub fn stopped(&self) -> bool {
        STATE.load(Ordering::SeqCst) == STOP
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        STATE.store(IDLE, Ordering::SeqCst);
    }
}
