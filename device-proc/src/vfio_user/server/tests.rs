mod client;
mod edge;
mod logging;
mod requests;
mod wire;
