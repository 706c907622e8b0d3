//! Draws a [`Timeline`] as SVG: time goes to the right, one lane for each device. The colour of a
//! lane says what state the device is in, the bars in it what it is doing.

use super::{Lane, PhaseSpan, Step, Timeline, Transition};
use standstill::coordinator::report::Nanos;
use standstill::protocol::message::Phase;
use svg::Document;
use svg::node::element::{Definitions, Group, Line, Marker, Path, Rectangle, Style, Text};

const WIDTH: f64 = 1200.0;
const LEFT: f64 = 96.0;
const RIGHT: f64 = 28.0;
/// How much of the running machine is shown before and after.
const LEAD: f64 = 34.0;
/// The break in the middle, where the machine stands still.
const BREAK: f64 = 92.0;
const LANES_TOP: f64 = 172.0;
const LABEL_TOP: f64 = 96.0;
const LABEL_WIDTH: f64 = 132.0;

const RUNNING: &str = "#d5ead8";
const QUIET: &str = "#fdf0c8";
const STOPPED: &str = "#d3dae6";
const LATE: &str = "#d61f2c";
const INK: &str = "#1f2933";
const FAINT: &str = "#66727f";

/// A phase's looks and words.
struct Theme {
    phase: Phase,
    /// While the device's hook runs.
    hook: &'static str,
    /// While it waits for what is under way to end.
    drain: &'static str,
    /// The state that the phase leads to.
    state: &'static str,
    /// What its barrier means.
    barrier: &'static str,
}

const THEMES: [Theme; 4] = [
    Theme {
        phase: Phase::PrepareStop,
        hook: "#f0a63a",
        drain: "#c8641b",
        state: QUIET,
        barrier: "all are quiet",
    },
    Theme {
        phase: Phase::Stop,
        hook: "#5b8fd9",
        drain: "#274f92",
        state: STOPPED,
        barrier: "all have stopped",
    },
    Theme {
        phase: Phase::PrepareStart,
        hook: "#9a7fd1",
        drain: "#5d409c",
        state: QUIET,
        barrier: "all accept writes",
    },
    Theme {
        phase: Phase::Start,
        hook: "#4fae6b",
        drain: "#24733d",
        state: RUNNING,
        barrier: "all run",
    },
];

fn theme(phase: Phase) -> &'static Theme {
    let index = match phase {
        Phase::PrepareStop => 0,
        Phase::Stop => 1,
        Phase::PrepareStart => 2,
        _ => 3,
    };
    &THEMES[index]
}

/// Where things go.
struct Plan {
    lane_height: f64,
    lanes: usize,
    pixels_per_ns: f64,
    pause_left: f64,
    resume_left: f64,
}

impl Plan {
    fn new(timeline: &Timeline) -> Self {
        let lanes = timeline.pause.lanes.len();
        let lane_height = (560.0 / lanes.max(1) as f64).clamp(4.0, 34.0);
        let total = (timeline.pause.end_ns + timeline.resume.end_ns).max(1) as f64;
        let pixels_per_ns = (WIDTH - LEFT - RIGHT - 2.0 * LEAD - BREAK) / total;
        let pause_left = LEFT + LEAD;
        let resume_left = pause_left + timeline.pause.end_ns as f64 * pixels_per_ns + BREAK;
        Self { lane_height, lanes, pixels_per_ns, pause_left, resume_left }
    }

    fn pause_x(&self, ns: u64) -> f64 {
        self.pause_left + ns as f64 * self.pixels_per_ns
    }

    fn resume_x(&self, ns: u64) -> f64 {
        self.resume_left + ns as f64 * self.pixels_per_ns
    }

    fn lane_y(&self, lane: usize) -> f64 {
        LANES_TOP + lane as f64 * self.lane_height
    }

    /// How high the coloured part of a lane is.
    fn band(&self) -> f64 {
        self.lane_height * 0.82
    }

    fn lanes_bottom(&self) -> f64 {
        self.lane_y(self.lanes)
    }

    fn height(&self) -> f64 {
        self.lanes_bottom() + 148.0
    }
}

/// Draws a round.
pub(crate) fn draw(timeline: &Timeline) -> Document {
    let plan = Plan::new(timeline);
    let mut document = Document::new()
        .set("viewBox", format!("0 0 {WIDTH} {:.0}", plan.height()))
        .set("width", WIDTH)
        .set("height", format!("{:.0}", plan.height()))
        .set("role", "img")
        .add(svg::node::element::Title::new("How a machine of device processes stops and starts"))
        .add(Style::new(
            "text{font-family:system-ui,'Segoe UI','DejaVu Sans',sans-serif}.m{text-anchor:middle}\
             .e{text-anchor:end}",
        ))
        .add(definitions())
        .add(rectangle(0.0, 0.0, WIDTH, plan.height(), "#ffffff").set("rx", 10));
    for part in heading(timeline) {
        document = document.add(part);
    }
    document = document.add(lanes(timeline, &plan)).add(standstill(&plan));
    document = document.add(barriers(timeline, &plan)).add(late_writes(timeline, &plan));
    document.add(axis(timeline, &plan)).add(legend(timeline, &plan))
}

fn heading(timeline: &Timeline) -> [Text; 2] {
    let count = timeline.pause.lanes.len();
    let (title, sentence) = if two_phase(timeline) {
        (
            format!("{count} devices that write into each other's memory stop as one, and go on"),
            "No device stops before all are quiet, and none writes to another before all accept \
             writes again; a phase takes as long as its slowest device.",
        )
    } else {
        (
            format!("{count} devices stop without a first phase: what the barrier is for"),
            "Each device stops when it is told to, but its peers still write into its memory: its \
             frozen state is wrong before the last one has stopped.",
        )
    };
    [
        text(28.0, 40.0, 21.0, INK, title).set("font-weight", 600),
        text(28.0, 65.0, 14.0, FAINT, sentence),
    ]
}

fn two_phase(timeline: &Timeline) -> bool {
    timeline.pause.phases.iter().any(|span| span.phase == Phase::PrepareStop)
}

fn definitions() -> Definitions {
    let head = Path::new().set("d", "M0,0 L7,3.5 L0,7 Z").set("fill", LATE);
    let arrow = Marker::new()
        .set("id", "late")
        .set("viewBox", "0 0 7 7")
        .set("refX", 6)
        .set("refY", 3.5)
        .set("markerWidth", 7)
        .set("markerHeight", 7)
        .set("markerUnits", "userSpaceOnUse")
        .set("orient", "auto")
        .add(head);
    Definitions::new().add(arrow)
}

fn lanes(timeline: &Timeline, plan: &Plan) -> Group {
    let mut group = Group::new();
    // Names only as close together as they can be read.
    let every =
        (1..=plan.lanes).find(|every| *every as f64 * plan.lane_height >= 11.0).unwrap_or(1);
    for (number, pause) in timeline.pause.lanes.iter().enumerate() {
        if number % every == 0 {
            let size = (plan.lane_height * 0.62).clamp(9.0, 13.0);
            let y = plan.lane_y(number) + plan.band() / 2.0 + size * 0.36;
            let name = text(LEFT - 10.0, y, size, INK, pause.name.clone()).set("class", "e");
            group = group.add(name);
        }
        let resume = timeline.resume.lanes.get(number);
        group = group.add(lane(number, pause, resume, timeline, plan));
    }
    group
}

/// One device's lane: first the states that it is in, then what it does.
fn lane(
    number: usize,
    pause: &Lane,
    resume: Option<&Lane>,
    timeline: &Timeline,
    plan: &Plan,
) -> Group {
    let y = plan.lane_y(number);
    let mut changes = vec![(LEFT, RUNNING)];
    let mut bars = Group::new();
    for step in &pause.steps {
        changes.push((plan.pause_x(step.reached_ns), theme(step.phase).state));
        bars = bars.add(bar(step, y, plan, |ns| plan.pause_x(ns)));
    }
    for step in resume.map(|lane| &lane.steps[..]).unwrap_or_default() {
        changes.push((plan.resume_x(step.reached_ns), theme(step.phase).state));
        bars = bars.add(bar(step, y, plan, |ns| plan.resume_x(ns)));
    }
    let end = plan.resume_x(timeline.resume.end_ns) + LEAD;
    let ends = changes.iter().skip(1).map(|change| change.0).chain([end]);
    let mut group = Group::new();
    for (&(from, colour), to) in changes.iter().zip(ends) {
        group = group.add(rectangle(from, y, (to - from).max(0.0), plan.band(), colour));
    }
    group.add(bars)
}

/// What a device does in a phase: the message's way there and back as a line, its hook and its
/// wait for what is under way as bars. Never so narrow that it cannot be seen.
fn bar(step: &Step, y: f64, plan: &Plan, x: impl Fn(u64) -> f64) -> Group {
    let theme = theme(step.phase);
    let (inset, height) = (plan.band() * 0.2, plan.band() * 0.6);
    let middle = y + plan.band() / 2.0;
    let way = line(x(step.sent_ns), middle, x(step.answered_ns), middle, theme.drain)
        .set("stroke-width", 1)
        .set("stroke-opacity", 0.55);
    let mut group = Group::new().add(way);
    let spans = [
        (step.began_ns, step.hook_ended_ns, theme.hook),
        (step.hook_ended_ns, step.reached_ns, theme.drain),
    ];
    for (from, to, colour) in spans {
        if from < to || colour == theme.drain {
            let width = (x(to) - x(from)).max(2.0);
            group = group.add(rectangle(x(to) - width, y + inset, width, height, colour));
        }
    }
    group
}

/// The break between pause and resume.
fn standstill(plan: &Plan) -> Group {
    let (left, right) = (plan.resume_left - BREAK, plan.resume_left);
    let (top, bottom) = (LANES_TOP - 8.0, plan.lanes_bottom() + 4.0);
    let middle = f64::midpoint(left, right);
    let mut zigzag = format!("M{:.1},{top:.1}", middle - 5.0);
    let mut y = top;
    let mut side = 5.0;
    while y < bottom {
        y = (y + 9.0).min(bottom);
        zigzag.push_str(&format!(" L{:.1},{y:.1}", middle + side));
        side = -side;
    }
    let torn = |width: u32, colour: &'static str| {
        Path::new()
            .set("d", zigzag.clone())
            .set("fill", "none")
            .set("stroke", colour)
            .set("stroke-width", width)
    };
    let (words, below) = ("stands still", "memory is checked");
    let bottom = bottom + 38.0;
    Group::new()
        .add(torn(9, "#ffffff"))
        .add(torn(1, "#9aa5b1"))
        .add(text(middle, bottom, 12.0, INK, words).set("class", "m").set("font-weight", 600))
        .add(text(middle, bottom + 15.0, 10.5, FAINT, below).set("class", "m"))
}

/// Where a label goes that belongs to a line.
struct Label {
    x: f64,
    /// Where the label's middle is, so that it covers no other.
    middle: f64,
    words: String,
    time: String,
    colour: &'static str,
    dashed: bool,
}

fn barriers(timeline: &Timeline, plan: &Plan) -> Group {
    let mut labels = Vec::new();
    let spans = |transition: &Transition| transition.phases.clone();
    if !two_phase(timeline) {
        labels.push(Label {
            x: plan.pause_x(0),
            middle: 0.0,
            words: "no first barrier".to_owned(),
            time: "nobody is quiet".to_owned(),
            colour: LATE,
            dashed: true,
        });
    }
    let pause = spans(&timeline.pause).into_iter().map(|s| (s, plan.pause_x(s.ended_ns)));
    let resume = spans(&timeline.resume).into_iter().map(|s| (s, plan.resume_x(s.ended_ns)));
    for (span, x) in pause.chain(resume) {
        let PhaseSpan { phase, began_ns, ended_ns } = span;
        labels.push(Label {
            x,
            middle: 0.0,
            words: theme(phase).barrier.to_owned(),
            time: format!("{phase}: {}", Nanos(ended_ns.saturating_sub(began_ns))),
            colour: INK,
            dashed: false,
        });
    }
    spread(&mut labels);
    labels.iter().fold(Group::new(), |group, label| group.add(barrier(label, plan)))
}

/// Moves labels apart that would cover each other, as little as possible, in their order.
fn spread(labels: &mut [Label]) {
    let half = LABEL_WIDTH / 2.0;
    let mut left = LEFT - 40.0;
    for label in &mut *labels {
        label.middle = label.x.max(left + half);
        left = label.middle + half;
    }
    let mut right = WIDTH - 8.0;
    for label in labels.iter_mut().rev() {
        label.middle = label.middle.min(right - half);
        right = label.middle - half;
    }
}

fn barrier(label: &Label, plan: &Plan) -> Group {
    let Label { x, middle, .. } = *label;
    let top = LANES_TOP - 10.0;
    let path = format!(
        "M{middle:.1},{:.1} L{middle:.1},{:.1} L{x:.1},{top:.1} L{x:.1},{:.1}",
        LABEL_TOP + 34.0,
        LABEL_TOP + 40.0,
        plan.lanes_bottom() + 4.0,
    );
    let mut stroke = Path::new()
        .set("d", path)
        .set("fill", "none")
        .set("stroke", label.colour)
        .set("stroke-width", 1.6)
        .set("stroke-linejoin", "round");
    if label.dashed {
        stroke = stroke.set("stroke-dasharray", "6 5");
    }
    let words = text(middle, LABEL_TOP + 13.0, 13.0, label.colour, label.words.clone());
    let time = text(middle, LABEL_TOP + 29.0, 11.5, FAINT, label.time.clone());
    Group::new()
        .add(stroke)
        .add(words.set("class", "m").set("font-weight", 600))
        .add(time.set("class", "m"))
}

/// For each late write: the part of the receiver's lane in which it had been told to stop and its
/// peer still wrote, and an arrow between the two.
fn late_writes(timeline: &Timeline, plan: &Plan) -> Group {
    let stop = |device: usize| {
        let lane = timeline.pause.lanes.get(device)?;
        lane.steps.iter().find(|step| step.phase == Phase::Stop)
    };
    let mut marks = Group::new();
    let mut arrows = Group::new();
    // More would cover the picture.
    let opacity = (24.0 / timeline.late.len().max(1) as f64).clamp(0.25, 0.9);
    for (number, &(writer, receiver)) in timeline.late.iter().enumerate() {
        let (Some(from), Some(to)) = (stop(writer), stop(receiver)) else { continue };
        let end = plan.pause_x(from.reached_ns);
        let begin = plan.pause_x(to.began_ns).min(end - 3.0);
        let y = plan.lane_y(receiver);
        let height = (plan.band() * 0.16).max(1.5);
        marks = marks.add(rectangle(begin, y + plan.band() - height, end - begin, height, LATE));
        if number < 64 {
            let middle = |device| plan.lane_y(device) + plan.band() / 2.0;
            let (y1, y2) = (middle(writer), middle(receiver));
            let bend = end + 8.0 + (number % 8) as f64 * 3.0;
            let curve =
                format!("M{end:.1},{y1:.1} C{bend:.1},{y1:.1} {bend:.1},{y2:.1} {end:.1},{y2:.1}");
            arrows = arrows.add(
                Path::new()
                    .set("d", curve)
                    .set("fill", "none")
                    .set("stroke", LATE)
                    .set("stroke-width", 1.2)
                    .set("stroke-opacity", opacity)
                    .set("marker-end", "url(#late)"),
            );
        }
    }
    marks.add(arrows)
}

fn axis(timeline: &Timeline, plan: &Plan) -> Group {
    let total = timeline.pause.end_ns + timeline.resume.end_ns;
    let step = tick_step(total / 9);
    let y = plan.lanes_bottom() + 8.0;
    let mut group = Group::new();
    let halves =
        [(plan.pause_left, timeline.pause.end_ns), (plan.resume_left, timeline.resume.end_ns)];
    for (left, end) in halves {
        let x = |ns: u64| left + ns as f64 * plan.pixels_per_ns;
        group = group.add(line(x(0), y, x(end), y, "#9aa5b1"));
        for ns in (0..=end).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            let label = text(x(ns), y + 17.0, 10.5, FAINT, tick_label(ns)).set("class", "m");
            group = group.add(line(x(ns), y, x(ns), y + 4.0, "#9aa5b1")).add(label);
        }
    }
    let unit = text(LEFT - 10.0, y + 17.0, 10.5, FAINT, "µs").set("class", "e");
    group.add(unit)
}

/// A round number of nanoseconds, at least that much.
fn tick_step(least: u64) -> u64 {
    let mut power = 1_000;
    loop {
        for factor in [1, 2, 5] {
            if power * factor >= least {
                return power * factor;
            }
        }
        power *= 10;
    }
}

/// Microseconds, in groups of three digits.
fn tick_label(ns: u64) -> String {
    let us = ns / 1_000;
    if us < 1_000 { us.to_string() } else { format!("{}\u{202f}{:03}", us / 1_000, us % 1_000) }
}

fn legend(timeline: &Timeline, plan: &Plan) -> Group {
    let y = plan.lanes_bottom() + 88.0;
    let mut x = LEFT;
    let mut group = Group::new();
    let mut entry = |group: Group, colour: &str, words: &str| {
        let swatch = rectangle(x, y - 10.0, 14.0, 12.0, colour).set("rx", 2);
        let label = text(x + 20.0, y, 12.0, INK, words);
        x += 34.0 + words.chars().count() as f64 * 6.6;
        group.add(swatch).add(label)
    };
    for (colour, words) in [
        (RUNNING, "runs"),
        (QUIET, "quiet: writes to no peer, accepts their writes"),
        (STOPPED, "stopped: nothing moves"),
    ] {
        group = entry(group, colour, words);
    }
    if !timeline.late.is_empty() {
        group = entry(group, LATE, "late: a peer wrote after this device was told to stop");
    }
    let y = y + 24.0;
    let mut x = LEFT;
    for theme in &THEMES {
        if theme.phase == Phase::PrepareStop && !two_phase(timeline) {
            continue;
        }
        let name = theme.phase.to_string();
        let words = format!("{name}: hook, then finishing");
        group = group
            .add(rectangle(x, y - 9.0, 11.0, 10.0, theme.hook))
            .add(rectangle(x + 11.0, y - 9.0, 11.0, 10.0, theme.drain))
            .add(text(x + 28.0, y, 12.0, INK, words.clone()));
        x += 44.0 + words.chars().count() as f64 * 6.3;
    }
    let about = format!(
        "Round {}. Measured by the coordinator; a thin line is a message on its way. Time for \
         hashing memory is left out.",
        timeline.round
    );
    group.add(text(LEFT, y + 24.0, 11.0, FAINT, about))
}

fn rectangle(x: f64, y: f64, width: f64, height: f64, colour: &str) -> Rectangle {
    Rectangle::new()
        .set("x", rounded(x))
        .set("y", rounded(y))
        .set("width", rounded(width))
        .set("height", rounded(height))
        .set("fill", colour)
}

fn line(x1: f64, y1: f64, x2: f64, y2: f64, colour: &str) -> Line {
    Line::new()
        .set("x1", rounded(x1))
        .set("y1", rounded(y1))
        .set("x2", rounded(x2))
        .set("y2", rounded(y2))
        .set("stroke", colour)
}

fn text(x: f64, y: f64, size: f64, colour: &str, words: impl Into<String>) -> Text {
    Text::new(words)
        .set("x", rounded(x))
        .set("y", rounded(y))
        .set("font-size", rounded(size))
        .set("fill", colour)
}

/// A tenth of a pixel is enough.
fn rounded(value: f64) -> String {
    format!("{value:.1}")
}
