mod client;
mod edge;
mod logging;
mod masters;
mod migration;
mod ours;
mod requests;
mod wire;
