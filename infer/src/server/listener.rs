//! Connections that cannot hang. A peer that takes nothing of what is written to it for a minute is given up, and with the
//! connection go its request and its job; so is one whose request does not come: not a whole head half a minute after it
//! began, or nothing for two minutes after an answer. (While a request is answered its body has a clock of its own.)

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::middleware::Next;
use axum::response::Response;
use axum::serve::{IncomingStream, Listener};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_stream::StreamExt;

/// How long a peer may keep us waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Taking nothing of an answer.
    pub stall: Duration,
    /// From the first byte of a request's head (of the first one: from the connection's beginning) to its last.
    pub head: Duration,
    /// Between an answer and the next request. Proxies keep their connections open for a minute, and must not find them
    /// closed at the moment they use them.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { stall: seconds(60), head: seconds(30), idle: seconds(120) }
    }
}

/// Accepts such connections.
#[derive(Debug)]
pub struct Patient {
    listener: TcpListener,
    patience: Patience,
}

impl Patient {
    /// Accepts what `listener` does.
    pub fn new(listener: TcpListener, patience: Patience) -> Self {
        Self { listener, patience }
    }
}

impl Listener for Patient {
    type Io = Connection<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (stream, address) = Listener::accept(&mut self.listener).await;
        // Each token at once, rather than some together a little later.
        let _ = stream.set_nodelay(true);
        (Connection::new(stream, self.patience), address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// The requests of a connection, which the server tells of and the connection's clock follows.
#[derive(Debug, Clone, Default)]
pub struct Requests(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

impl Connected<IncomingStream<'_, Patient>> for Requests {
    fn connect_info(stream: IncomingStream<'_, Patient>) -> Self {
        stream.io().requests.clone()
    }
}

/// A request is being answered, until the end of its answer drops this.
#[derive(Debug)]
struct Answering(Requests);

impl Answering {
    fn new(requests: Requests) -> Self {
        requests.0.begun.fetch_add(1, Ordering::SeqCst);
        Self(requests)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// Tells the connection of each request (a middleware, the outermost).
pub async fn answering(request: Request, next: Next) -> Response {
    let requests = request.extensions().get::<ConnectInfo<Requests>>().map(|info| info.0.clone());
    let Some(requests) = requests else { return next.run(request).await };
    let answering = Answering::new(requests);
    let response = next.run(request).await;
    if response.body().size_hint().exact().is_some() {
        return response; // it is there, and written next
    }
    response.map(|body| {
        Body::from_stream(body.into_data_stream().map(move |bytes| {
            let _ = &answering; // dropped with the stream
            bytes
        }))
    })
}

/// A connection that fails when it has waited too long.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    patience: Patience,
    /// Runs while the peer takes nothing.
    stalls: Option<Pin<Box<Sleep>>>,
    /// Runs while no request comes.
    waits: Option<Pin<Box<Sleep>>>,
    requests: Requests,
    /// How many of them had begun.
    seen: usize,
    /// When the head that is coming began.
    head: Option<Instant>,
    /// When some of an answer was last taken.
    active: Instant,
}

impl<S> Connection<S> {
    /// Over `stream`.
    pub fn new(stream: S, patience: Patience) -> Self {
        let now = Instant::now();
        let (requests, head) = (Requests::default(), Some(now));
        Self { stream, patience, stalls: None, waits: None, requests, seen: 0, head, active: now }
    }

    /// What a write came to, unless it has waited too long.
    fn watch<T>(&mut self, poll: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalls = None;
            return poll;
        }
        let stall = self.patience.stall;
        let stalls = self.stalls.get_or_insert_with(|| Box::pin(sleep(stall)));
        stalls.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }

    fn wrote(&mut self, poll: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(1..)) = poll {
            self.active = Instant::now();
        }
    }

    /// Nothing has come: whether a request has been waited for too long.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let Patience { head, idle, .. } = self.patience;
            let end = match (self.answers(), self.head) {
                // Nobody asks again when the answer has ended: the clock runs on, and looks now and then.
                (true, _) => Instant::now() + idle,
                (false, Some(begun)) => begun + head,
                (false, None) => self.active + idle,
            };
            let waits = self.waits.get_or_insert_with(|| Box::pin(sleep_until(end)));
            if waits.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if waits.deadline() >= end {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.waits = None; // something has happened since
        }
    }

    /// Whether a request is being answered.
    fn answers(&mut self) -> bool {
        let Counts { begun, ended } = &*self.requests.0;
        let (ended, begun) = (ended.load(Ordering::SeqCst), begun.load(Ordering::SeqCst));
        if begun != self.seen {
            (self.seen, self.head) = (begun, None);
        }
        begun != ended
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut self.stream).poll_read(context, buf);
        if poll.is_pending() {
            return self.wait(context);
        }
        self.waits = None;
        if buf.filled().len() > before && !self.answers() {
            self.head.get_or_insert_with(Instant::now);
        }
        poll
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, buf);
        self.wrote(&poll);
        self.watch(poll, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, bufs);
        self.wrote(&poll);
        self.watch(poll, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(poll, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::middleware::from_fn;
    use axum::routing::{get, post};
    use std::io::{Read, Write};
    use std::net::TcpStream as Client;
    use std::task::Waker;

    /// Takes so many bytes and then nothing.
    struct Full(usize);

    impl AsyncWrite for Full {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let n = self.0.min(buf.len());
            self.0 -= n;
            if n == 0 { Poll::Pending } else { Poll::Ready(Ok(n)) }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn a_peer_that_takes_nothing_is_given_up() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let stall = Duration::from_millis(20);
            let mut connection = Connection::new(Full(3), Patience { stall, ..Patience::default() });
            let write = std::future::poll_fn(|context| Pin::new(&mut connection).poll_write(context, b"abcd"));
            assert_eq!(write.await.unwrap(), 3);
            let write = std::future::poll_fn(|context| Pin::new(&mut connection).poll_write(context, b"d"));
            assert_eq!(write.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
            // Whoever takes a byte now and then may take long.
            connection.stalls = None;
            for _ in 0..3 {
                let mut context = Context::from_waker(Waker::noop());
                assert!(Pin::new(&mut connection).poll_write(&mut context, b"d").is_pending());
                tokio::time::sleep(Duration::from_millis(12)).await;
                connection.stream.0 = 1;
                assert!(Pin::new(&mut connection).poll_write(&mut context, b"d").is_ready());
            }
        });
    }

    const MS: Duration = Duration::from_millis(1);

    /// A server with that patience: `/` answers at once, `/late` and the stream `/slow` after a second, `/sum` when it has
    /// the body.
    fn serve(patience: Patience, test: impl FnOnce(&dyn Fn() -> Client)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let late = || async {
            sleep(1000 * MS).await;
            "late"
        };
        let slow = || async {
            Body::from_stream(tokio_stream::iter(0..5).then(|n| async move {
                sleep(200 * MS).await;
                Ok::<_, std::convert::Infallible>(format!("{n};"))
            }))
        };
        let router = Router::new()
            .route("/", get(|| async { "at once" }))
            .route("/late", get(late))
            .route("/slow", get(slow))
            .route("/sum", post(|text: String| async move { text.len().to_string() }))
            .layer(from_fn(answering))
            .into_make_service_with_connect_info::<Requests>();
        runtime.spawn(axum::serve(Patient::new(listener, patience), router).into_future());
        test(&|| {
            let client = Client::connect(address).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            client
        });
        runtime.shutdown_background();
    }

    /// All that comes until the server closes, and when that was.
    fn rest(mut client: &Client, since: std::time::Instant) -> (String, Duration) {
        let mut text = String::new();
        match client.read_to_string(&mut text) {
            Ok(_) => (),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
        }
        (text, since.elapsed())
    }

    /// The head and `length` bytes of an answer.
    fn answer(mut client: &Client, length: usize) -> String {
        let mut text = Vec::new();
        let mut byte = [0];
        while !text.ends_with(b"\r\n\r\n") {
            client.read_exact(&mut byte).unwrap();
            text.push(byte[0]);
        }
        let mut body = vec![0; length];
        client.read_exact(&mut body).unwrap();
        assert!(text.starts_with(b"HTTP/1.1 200"));
        String::from_utf8(body).unwrap()
    }

    #[test]
    fn a_head_that_does_not_come_whole_is_given_up() {
        let patience = Patience { head: 600 * MS, ..Patience::default() };
        serve(patience, |connect| {
            for start in ["", "G", "GET / HTTP/1.1\r\nHost: a\r\n"] {
                let (mut client, since) = (connect(), std::time::Instant::now());
                client.write_all(start.as_bytes()).unwrap();
                let (text, after) = rest(&client, since);
                assert!(text.is_empty() && after > 500 * MS, "{start:?}: {text:?} after {after:?}");
            }
            // A little now and then does not help.
            let (mut client, since) = (connect(), std::time::Instant::now());
            let head = b"GET / HTTP/1.1\r\nHost: a\r\nx-long: ".iter().chain(std::iter::repeat(&b'x'));
            let sent = head.take(1000).take_while(|byte| {
                std::thread::sleep(20 * MS);
                client.write_all(&[**byte]).is_ok()
            });
            assert!(sent.count() < 500);
            assert!(rest(&client, since).0.is_empty());
            // Nor on a connection that has had its answer.
            let mut client = connect();
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            assert_eq!(answer(&client, 7), "at once");
            let since = std::time::Instant::now();
            client.write_all(b"GET / HT").unwrap();
            let (text, after) = rest(&client, since);
            assert!(text.is_empty() && after > 500 * MS, "{text:?} after {after:?}");
        });
    }

    #[test]
    fn answers_bodies_and_pauses_may_take_longer_than_a_head() {
        let patience = Patience { head: 600 * MS, ..Patience::default() };
        serve(patience, |connect| {
            let mut client = connect();
            for _ in 0..2 {
                client.write_all(b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
                assert_eq!(answer(&client, 4), "late");
                client.write_all(b"POST /sum HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n").unwrap();
                for _ in 0..3 {
                    std::thread::sleep(300 * MS);
                    client.write_all(b"x").unwrap();
                }
                assert_eq!(answer(&client, 1), "3");
                std::thread::sleep(1000 * MS);
            }
            client.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
            let text = rest(&client, std::time::Instant::now()).0;
            assert!((0..5).all(|n| text.contains(&format!("{n};"))), "{text}");
        });
    }

    #[test]
    fn a_connection_without_requests_is_closed_some_time() {
        // The clock that was set for the head may run on until then.
        let patience = Patience { idle: 300 * MS, head: 600 * MS, ..Patience::default() };
        serve(patience, |connect| {
            for (path, length) in [("/", 7), ("/late", 4)] {
                let mut client = connect();
                client.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
                answer(&client, length);
                let (text, after) = rest(&client, std::time::Instant::now());
                assert!(text.is_empty() && after > 200 * MS, "{path}: {text:?} after {after:?}");
            }
            // After a stream too.
            let mut client = connect();
            client.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            let (text, after) = rest(&client, std::time::Instant::now());
            assert!(text.ends_with("0\r\n\r\n") && after > 1200 * MS, "{text:?} after {after:?}");
        });
    }
}
