//! Work on several things at once, on the threads that the kernels use.

use m1_kernels::base::pool;
use std::sync::{Mutex, PoisonError};

/// `make` of each item, in their order, made on the pool's threads. What `make` has the pool do stays on its thread where there
/// are several items; a single one has all threads.
pub(crate) fn on_pool<T: Send, R: Send>(items: impl IntoIterator<Item = T>, make: impl Fn(T) -> R + Sync) -> Vec<R> {
    // Each place is locked twice, by one thread at a time.
    let places: Vec<Mutex<(Option<T>, Option<R>)>> =
        items.into_iter().map(|item| Mutex::new((Some(item), None))).collect();
    pool::run(places.len(), |i| {
        let mut place = places[i].lock().unwrap_or_else(PoisonError::into_inner);
        place.1 = place.0.take().map(&make);
    });
    places.into_iter().filter_map(|place| place.into_inner().unwrap_or_else(PoisonError::into_inner).1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_their_items() {
        for threads in [1, 2, 5] {
            pool::with_threads(threads, || {
                let mut items = vec![1, 2, 3, 4, 5, 6, 7];
                let made = on_pool(&mut items, |item| {
                    *item *= 10;
                    on_pool([*item, 1], |part| part + 1).into_iter().sum::<i32>()
                });
                assert_eq!(items, [10, 20, 30, 40, 50, 60, 70]);
                assert_eq!(made, [13, 23, 33, 43, 53, 63, 73], "{threads} threads");
                assert!(on_pool([], |item: u8| item).is_empty());
            });
        }
    }
}
