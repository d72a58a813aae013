//! Plots: one drawing, written as SVG and as PNG. Knows no study.

use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;
use std::ops::Range;
use std::path::Path;
use std::sync::Once;

const SIZE: (u32, u32) = (960, 600);
/// The first seven can be told apart by the colour-blind (Okabe and Ito).
const COLORS: [RGBColor; 11] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(130, 130, 130),
    RGBColor(120, 70, 20),
    RGBColor(140, 140, 0),
    RGBColor(110, 60, 170),
];
/// Beside a chart of several series.
const LEGEND_WIDTH: u32 = 360;
/// Beside bars.
const BAR_NAMES: u32 = 190;
/// Width of a character beside a bar, about.
const BAR_LABEL_CHARACTER: f64 = 7.0;

/// Points, those of a curve joined by lines; of one series alone with their error bars and labels.
pub struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    /// Points left of 1 are not drawn then.
    pub log_x: bool,
    /// What the axis of y holds at least.
    pub y_range: Range<f64>,
    pub series: Vec<Series>,
}

pub struct Series {
    pub name: String,
    /// Points of one parameter that grows, not of things that differ in kind.
    pub is_curve: bool,
    pub points: Vec<ChartPoint>,
}

#[derive(Clone, Debug)]
pub struct ChartPoint {
    pub x: f64,
    pub y: f64,
    pub error: Option<(f64, f64)>,
    /// Written beside it.
    pub label: String,
}

/// Horizontal bars, each beginning where it is said to: a waterfall.
pub struct Waterfall {
    pub title: String,
    pub x: String,
    /// From the top: name, from, to, what is written beside it.
    pub bars: Vec<(String, f64, f64, String)>,
}

/// `name` without an extension.
///
/// # Errors
/// Files that cannot be written.
pub fn save_chart(chart: &Chart, name: &Path) -> Result<()> {
    let size = if chart.series.len() > 1 { (SIZE.0 + LEGEND_WIDTH, SIZE.1) } else { SIZE };
    save(name, size, |area| draw_chart(&area, chart), |area| draw_chart(&area, chart))
}

/// # Errors
/// As [`save_chart`].
pub fn save_waterfall(waterfall: &Waterfall, name: &Path) -> Result<()> {
    let size = (SIZE.0, 130 + 34 * waterfall.bars.len() as u32);
    save(name, size, |area| draw_waterfall(&area, waterfall), |area| draw_waterfall(&area, waterfall))
}

type Drawn<Backend> = std::result::Result<(), DrawingAreaErrorKind<<Backend as DrawingBackend>::ErrorType>>;

fn save(
    name: &Path,
    size: (u32, u32),
    svg: impl Fn(DrawingArea<SVGBackend, Shift>) -> Drawn<SVGBackend<'static>>,
    png: impl Fn(DrawingArea<BitMapBackend, Shift>) -> Drawn<BitMapBackend<'static>>,
) -> Result<()> {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        let font = register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
        assert!(font.is_ok(), "the font is in the binary");
    });
    let failed = |path: &Path, e: &dyn std::fmt::Display| {
        Error::Output(std::io::Error::other(format!("{}: {e}", path.display())))
    };
    let path = name.with_extension("svg");
    svg(SVGBackend::new(&path, size).into_drawing_area()).map_err(|e| failed(&path, &e))?;
    let path = name.with_extension("png");
    png(BitMapBackend::new(&path, size).into_drawing_area()).map_err(|e| failed(&path, &e))
}

/// The logarithm to base 2 of an axis, or the values themselves; ticks are at whole powers or at round numbers.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn place(log: bool, x: f64) -> f64 {
        if log { x.log2() } else { x }
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        number(*value)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let place = |x| Axis::place(self.log, x);
        let share = (place(*value) - place(self.low)) / (place(self.high) - place(self.low));
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if self.log {
            let (first, last) = (self.low.log2().ceil() as i32, self.high.log2().floor() as i32);
            return (first..=last).map(|power| f64::from(power).exp2()).collect();
        }
        let step = round_step((self.high - self.low) / hint.max_num_points().clamp(2, 10) as f64);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|&x| x <= self.high + step * 1e-9).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

/// The next larger of 1, 2, 5, 10, ...
fn round_step(at_least: f64) -> f64 {
    let power = 10f64.powf(at_least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|&n| n >= at_least * 0.999).unwrap_or(10.0 * power)
}

fn number(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { (2 - value.abs().log10().floor() as i32).clamp(0, 6) as usize };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
}

fn draw_chart<Backend: DrawingBackend>(area: &DrawingArea<Backend, Shift>, chart: &Chart) -> Drawn<Backend> {
    area.fill(&WHITE)?;
    let (plot, legend) = area.split_horizontally(SIZE.0);
    let visible = |p: &&ChartPoint| !chart.log_x || p.x >= 1.0;
    let all = || chart.series.iter().flat_map(|s| s.points.iter().filter(visible));
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
    };
    let (mut left, mut right) = bounds(&mut all().map(|p| p.x));
    let (mut bottom, mut top) = bounds(&mut all().flat_map(|p| p.error.map_or([p.y; 2], |(low, high)| [low, high])));
    if left > right {
        (left, right, bottom, top) = (1.0, 2.0, chart.y_range.start, chart.y_range.end);
    }
    // Some room around the points.
    (left, right) = match chart.log_x {
        true => (left / 1.25, right * 1.25),
        false => (left - 0.05 * (right - left).max(1e-9), right + 0.08 * (right - left).max(1e-9)),
    };
    (bottom, top) = (bottom.min(chart.y_range.start), top.max(chart.y_range.end));
    let margin = 0.04 * (top - bottom);
    (bottom, top) = (bottom - margin, top + margin);
    let mut canvas = ChartBuilder::on(&plot)
        .caption(&chart.title, ("sans-serif", 24))
        .margin(14)
        .x_label_area_size(52)
        .y_label_area_size(64)
        .build_cartesian_2d(
            Axis { low: left, high: right, log: chart.log_x },
            Axis { low: bottom, high: top, log: false },
        )?;
    canvas
        .configure_mesh()
        .x_desc(&chart.x)
        .y_desc(&chart.y)
        .x_labels(10)
        .y_labels(10)
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .label_style(("sans-serif", 16))
        .axis_desc_style(("sans-serif", 18))
        .draw()?;
    let several = chart.series.len() > 1;
    for (i, (series, color)) in chart.series.iter().zip(COLORS.iter().cycle().copied()).enumerate() {
        let mut points: Vec<&ChartPoint> = series.points.iter().filter(visible).collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        if series.is_curve {
            canvas.draw_series(LineSeries::new(points.iter().map(|p| (p.x, p.y)), color.stroke_width(2)))?;
        }
        canvas.draw_series(points.iter().map(|p| Circle::new((p.x, p.y), 4, color.filled())))?;
        let text = |size| ("sans-serif", size).into_text_style(area).color(&color);
        if several {
            let y = 60 + 28 * i as i32;
            legend.draw(&PathElement::new([(8, y), (34, y)], color.stroke_width(4)))?;
            legend.draw(&Text::new(series.name.clone(), (42, y - 9), text(16)))?;
        } else {
            let bars = points.iter().filter_map(|p| p.error.map(|(low, high)| [(p.x, low), (p.x, high)]));
            canvas.draw_series(bars.map(|ends| PathElement::new(ends, color.mix(0.45).stroke_width(2))))?;
            canvas.draw_series(
                points.iter().map(|p| EmptyElement::at((p.x, p.y)) + Text::new(p.label.clone(), (8, 6), text(15))),
            )?;
        }
    }
    area.present()
}

fn draw_waterfall<Backend: DrawingBackend>(area: &DrawingArea<Backend, Shift>, w: &Waterfall) -> Drawn<Backend> {
    area.fill(&WHITE)?;
    let low = w.bars.iter().map(|b| b.1.min(b.2)).fold(0.0, f64::min);
    let high = w.bars.iter().map(|b| b.1.max(b.2)).fold(1e-9, f64::max);
    let rows = w.bars.len().max(1) as f64;
    // So that what is written beside a bar ends within the picture.
    let room = |(_, from, to, label): &(String, f64, f64, String)| {
        let written = (label.chars().count() as f64 * BAR_LABEL_CHARACTER + 12.0) / f64::from(SIZE.0 - BAR_NAMES - 28);
        (from.max(*to) - low) / (high - low) / (1.0 - written.min(0.9))
    };
    let room = w.bars.iter().map(room).fold(1.0, f64::max);
    let mut canvas = ChartBuilder::on(area)
        .caption(&w.title, ("sans-serif", 24))
        .margin(14)
        .x_label_area_size(48)
        .y_label_area_size(BAR_NAMES)
        .build_cartesian_2d(
            Axis { low, high: low + (high - low) * room, log: false },
            Axis { low: 0.0, high: rows, log: false },
        )?;
    canvas
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc(&w.x)
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .label_style(("sans-serif", 16))
        .axis_desc_style(("sans-serif", 18))
        .draw()?;
    let text = ("sans-serif", 15).into_text_style(area);
    let plot_top = canvas.plotting_area().get_pixel_range().1.start;
    let height = canvas.plotting_area().dim_in_pixel().1 as f64 / rows;
    for (i, (name, from, to, label)) in w.bars.iter().enumerate() {
        let (top, bottom) = (rows - i as f64 - 0.18, rows - i as f64 - 0.82);
        let color = COLORS[i % COLORS.len()];
        canvas.draw_series([Rectangle::new([(*from, top), (*to, bottom)], color.mix(0.8).filled())])?;
        let beside = EmptyElement::at((from.max(*to), top)) + Text::new(label.clone(), (6, 4), text.clone());
        canvas.draw_series([beside])?;
        area.draw_text(name, &text, (14, plot_top + ((i as f64 + 0.32) * height) as i32))?;
    }
    area.present()
}
