//! From a buffer of cells to the escape sequences that put it in the place of the one before.

use std::fmt::Write as _;

use console::Style;
use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier};

/// Knows what it has drawn; the cursor stands at the start of the line under it.
#[derive(Debug, Default)]
pub(super) struct Painter {
    lines: u16,
    size: Option<(u16, u16)>,
}

impl Painter {
    /// The text that replaces the last block by `messages` and a new block, on a terminal of `size` rows and columns.
    /// One text, written at once: whatever ends the program ends it between two drawings.
    pub(super) fn frame(&mut self, buffer: &Buffer, messages: &[&str], size: (u16, u16)) -> String {
        let mut out = String::new();
        if self.lines > 0 {
            // A narrower terminal has wrapped the lines that are there, nobody knows where.
            match self.size == Some(size) {
                true => write!(out, "\x1b[{}A\r", self.lines).expect("a string takes it"),
                false => out += "\r\x1b[J",
            }
        }
        for message in messages {
            out += message;
            out += "\x1b[K\n";
        }
        let area = buffer.area;
        for y in 0..area.height {
            let mut run = String::new();
            let mut style = None;
            for x in 0..area.width {
                let cell = &buffer[(x, y)];
                let this = (cell.fg, cell.modifier);
                if style != Some(this) {
                    paint(&mut out, style, &mut run);
                    style = Some(this);
                }
                run += cell.symbol();
            }
            if style.is_none_or(|(color, modifier)| color == Color::Reset && modifier.is_empty()) {
                run.truncate(run.trim_end().len());
            }
            paint(&mut out, style, &mut run);
            out += "\x1b[K\n";
        }
        out += "\x1b[J";
        (self.lines, self.size) = (area.height, Some(size));
        out
    }
}

/// Appends a run of cells of one style and empties it.
fn paint(out: &mut String, style: Option<(Color, Modifier)>, run: &mut String) {
    let Some((color, modifier)) = style else { return };
    let mut style = Style::new().for_stderr();
    style = match color {
        Color::Cyan => style.cyan(),
        Color::Green => style.green(),
        Color::Yellow => style.yellow(),
        Color::Magenta => style.magenta(),
        _ => style,
    };
    if modifier.contains(Modifier::BOLD) {
        style = style.bold();
    }
    if modifier.contains(Modifier::DIM) {
        style = style.dim();
    }
    // console leaves the colours out where NO_COLOR asks for it.
    write!(out, "{}", style.apply_to(&run)).expect("a string takes it");
    run.clear();
}
