//! Which route answers what, and what every request passes on its way: its record, the origins allowed, its key.

use super::error::ApiError;
use super::record::Record;
use super::state::App;
use super::{chat, completions, listener, tokens};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// All routes.
pub fn router(app: App) -> Router {
    let router = Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/models", get(tokens::models))
        .route("/v1/models/{*name}", get(tokens::one_model))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/health", get(tokens::health))
        .route("/metrics", get(tokens::counters))
        .route("/", get(tokens::page))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(app.clone(), keys));
    let router = match cors(&app.settings.cors) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    let router = router.layer(from_fn_with_state(app.clone(), recorded));
    router.layer(from_fn(listener::answering)).with_state(app)
}

async fn no_route(request: Request) -> ApiError {
    ApiError::route(request.method().as_str(), request.uri().path())
}

async fn no_method(request: Request) -> ApiError {
    ApiError::method(request.method().as_str(), request.uri().path())
}

/// Begins the request's record and names it in the answer.
async fn recorded(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let record = Record::new(app.metrics.clone(), request.method().clone(), request.uri().path());
    request.extensions_mut().insert(record.clone());
    let mut response = next.run(request).await;
    record.status(response.status());
    if let Some(error) = response.extensions().get::<ApiError>() {
        record.error(&error.message);
    }
    if let Ok(id) = HeaderValue::from_str(record.id()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Lets those pass who have a key, if keys are asked for. The page and whether the server is there are no secrets.
async fn keys(State(app): State<App>, request: Request, next: Next) -> Response {
    let open = matches!(request.uri().path(), "/" | "/health");
    let keys = &app.settings.api_keys;
    let sent = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    let sent = sent.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "));
    let sent = sent.map_or(&b""[..], |(_, key)| key.trim_ascii());
    // All are compared, each to its end: the time tells nothing but lengths.
    let known = keys.iter().fold(false, |known, key| known | same(key.as_bytes(), sent));
    if open || keys.is_empty() || known { next.run(request).await } else { ApiError::unauthorized().into_response() }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    let differ = a.iter().zip(b).fold(0, |differ, (a, b)| std::hint::black_box(differ | (a ^ b)));
    differ == 0 && a.len() == b.len()
}

/// What pages of other origins may do; nothing where none is named.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        let list: Vec<HeaderValue> = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()).collect();
        AllowOrigin::list(list)
    };
    let layer = CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID, header::RETRY_AFTER]);
    (!origins.is_empty()).then_some(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_same_or_not() {
        assert!(same(b"", b"") && same(b"abc", b"abc"));
        assert!(!same(b"abc", b"abd") && !same(b"abc", b"ab") && !same(b"ab", b"abc") && !same(b"", b"a"));
    }
}
