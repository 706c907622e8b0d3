mod client;
mod edge;
mod logging;
mod migration;
mod ours;
mod requests;
mod wire;
