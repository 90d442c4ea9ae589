//! Runs the sections of a check, each in a process of its own, started from this one: a kernel that faults or hangs takes its process
//! along, is named, and the section goes on behind that run in a new process which leaves the kernel out.

use crate::device::{self, Choice, Device};
use crate::journal::{self, Entry};
use crate::quarantine::{Incident, Known};
use crate::report::{Report, Summary};
use crate::section::{self, At, Event, Row, Span, State};
use crate::{Args, Outcome, Section};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What a process may take to end: by itself once the time is up, with the references of a chunk of items, or when it is killed.
const GRACE: Duration = Duration::from_secs(15);

/// What a process of a section reads on stdin, as a line of JSON.
#[derive(Serialize, Deserialize)]
pub struct Start {
    pub section: String,
    pub from: At,
    pub seconds: f64,
    pub known: Known,
}

/// Everything that is known while the check runs.
pub struct Check<'a> {
    args: &'a Args,
    data: PathBuf,
    emulation: PathBuf,
    start: Instant,
    deadline: Instant,
    patience: Duration,
    known: Known,
    report: Report,
    journal: Option<File>,
    /// The section at work began.
    began: Instant,
    spoke: Instant,
}

/// What a process is doing.
#[derive(Default)]
struct Doing {
    /// Where the section goes on after the run.
    next: At,
    /// The row of the run that is on the device, should nothing come of it.
    run: Option<Row>,
    /// What goes on there, and since when: a kernel, or a graph of several.
    outstanding: Option<(Instant, Option<String>)>,
    /// Whether it ever began a run.
    began: bool,
    /// Whether the last run said what went wrong.
    explained: bool,
}

impl<'a> Check<'a> {
    /// A check of this device.
    pub fn new(args: &'a Args, data: PathBuf, device: &Device) -> Outcome<Check<'a>> {
        let start = Instant::now();
        let mut check = Check {
            args,
            data,
            emulation: device.emulation.clone(),
            start,
            deadline: start + Duration::from_secs(args.time_limit),
            patience: args.patience.unwrap_or_else(|| patience(&args.device)),
            known: Known { quarantined: args.quarantine.iter().cloned().collect(), ..Known::default() },
            report: Report::default(),
            journal: args.journal.as_deref().map(journal::create).transpose()?,
            began: start,
            spoke: start,
        };
        check.put(Entry::Head(args.head(device)))?;
        Ok(check)
    }

    fn put(&mut self, entry: Entry) -> Outcome<()> {
        if let Some(file) = &mut self.journal {
            journal::write(file, &entry)?;
        }
        self.report.take(entry);
        Ok(())
    }

    /// Runs all sections: here, if a device is given, else each in processes of its own. Whether all passed.
    pub fn run(mut self, device: Option<&Device>) -> Outcome<(PathBuf, bool)> {
        let sections = self.args.sections();
        let mut gone = false;
        for &section in &sections {
            self.began = Instant::now();
            self.put(Entry::Section(Summary { section: section.name(), ..Summary::default() }))?;
            match device {
                _ if gone || Instant::now() >= self.deadline => {
                    self.summary().items = section.items(self.args, &self.data).len();
                }
                Some(device) => gone = self.here(section, device)?,
                None => self.apart(section)?,
            }
            self.progress()?;
            // The caller may end this before it ends itself.
            self.write()?;
        }
        let all = [Section::Conformance, Section::Kernels].iter().all(|section| sections.contains(section));
        let mut never_launched = vec![];
        if all && self.args.cases.is_empty() && self.report.unreached() == 0 {
            let launched = self.report.launched();
            let kernels: BTreeSet<String> = device::all_kernels(&self.args.device, &self.emulation)?;
            never_launched = kernels.into_iter().filter(|kernel| !launched.contains(&kernel[..])).collect();
        }
        if !never_launched.is_empty() {
            eprintln!("never launched: {}", never_launched.join(", "));
        }
        self.put(Entry::End { seconds: self.start.elapsed().as_secs_f64(), never_launched })?;
        eprintln!("{}, {:.0} s", self.report.verdict(), self.report.seconds);
        Ok((self.write()?, self.report.ok))
    }

    /// Of the section at work, which [`Check::run`] put there.
    fn summary(&mut self) -> &mut Summary {
        let last = self.report.sections.len() - 1;
        &mut self.report.sections[last]
    }

    fn write(&self) -> Outcome<PathBuf> {
        let out = &self.args.out;
        self.report.write(out).map_err(|error| format!("{}: {error}", out.display()).into())
    }

    /// Handles an event; why the device is lost, if it is.
    fn take(&mut self, event: Event, doing: &mut Doing) -> Outcome<Option<String>> {
        match event {
            Event::Items(count) => self.summary().items = count,
            Event::Begin { name, dtype, next } => {
                (doing.next, doing.began) = (next, true);
                doing.run = Some(Row { section: self.summary().section.clone(), ..Row::failed(name, dtype, "") });
            }
            Event::Launch(kernel) => {
                if let Some((row, kernel)) = doing.run.as_mut().zip(kernel.as_ref())
                    && !row.kernels.contains(kernel)
                {
                    row.kernels.push(kernel.clone());
                }
                doing.outstanding = Some((Instant::now(), kernel));
            }
            Event::Back => doing.outstanding = None,
            Event::End { rows, incident } => {
                (doing.run, doing.outstanding) = (None, None);
                self.summary().reached = doing.next.item;
                doing.explained = incident.is_some();
                self.end(rows, incident)?;
            }
            Event::Lost(why) => return Ok(Some(why)),
            Event::Done => {}
        }
        if self.spoke.elapsed() > Duration::from_secs(5) {
            self.progress()?;
        }
        Ok(None)
    }

    /// A run has ended, or was ended.
    fn end(&mut self, rows: Vec<Row>, incident: Option<Incident>) -> Outcome<()> {
        if rows.iter().all(|row| row.is(State::Passed)) {
            self.known.proven.extend(rows.iter().flat_map(|row| row.kernels.iter().cloned()));
        }
        for row in rows {
            if row.is(State::Failed) && self.summary().failed < 20 {
                let numbers = row.error.zip(row.allowed);
                let numbers =
                    numbers.map_or(String::new(), |(error, allowed)| format!("{error:.3e} of {allowed:.3e}, "));
                eprintln!("FAILED {} {} {}: {numbers}{}", row.section, row.name, row.dtype, row.what);
            }
            self.put(Entry::Row(row))?;
        }
        let Some(incident) = incident else { return Ok(()) };
        self.known.take(&incident);
        if let Some(kernel) = &incident.kernel {
            let then = if incident.quarantined { ", not launched again" } else { "" };
            eprintln!("KERNEL {kernel}{then}: {}: {}", incident.name, incident.what);
        }
        self.put(Entry::Incident(incident))
    }

    fn progress(&mut self) -> Outcome<()> {
        self.spoke = Instant::now();
        self.summary().seconds = self.began.elapsed().as_secs_f64();
        let summary = self.summary().clone();
        let Summary { section, items, reached, failed, .. } = &summary;
        let seconds = self.start.elapsed().as_secs();
        eprintln!("{seconds:4} s  {section}: {reached} of {items}, {failed} rows failed");
        self.put(Entry::Section(summary))
    }

    /// Runs a section in this process; whether the device is lost.
    fn here(&mut self, section: Section, device: &Device) -> Outcome<bool> {
        let items = section.items(self.args, &self.data);
        let span = Span { from: At::default(), deadline: self.deadline, keep_going: self.args.keep_going };
        device.kernels.borrow_mut().known.clone_from(&self.known);
        let (mut doing, mut lost, mut trouble) = (Doing::default(), None, None);
        section::run(&section.name(), &items, span, device, &mut |event| match self.take(event, &mut doing) {
            Ok(why) => lost = lost.take().or(why),
            Err(error) => trouble = trouble.take().or(Some(error)),
        });
        trouble.map_or(Ok(()), Err)?;
        let Some(why) = lost else { return Ok(false) };
        if !doing.explained {
            let incident = self.incident("the device", None, format!("is lost: {why}"));
            self.end(vec![], Some(incident))?;
        }
        Ok(true)
    }

    fn incident(&mut self, name: impl Into<String>, kernel: Option<String>, what: String) -> Incident {
        let (section, quarantined) = (self.summary().section.clone(), kernel.is_some());
        Incident { section, name: name.into(), kernel, quarantined, what }
    }

    /// Runs a section in processes of its own.
    fn apart(&mut self, section: Section) -> Outcome<()> {
        let mut doing = Doing::default();
        loop {
            doing = Doing { next: doing.next, ..Doing::default() };
            let mut child = self.spawn(section, doing.next)?;
            let watched = self.watch(&mut child, &mut doing);
            let end = end(&mut child)?;
            let why = match watched? {
                Watched::Done => return Ok(()),
                Watched::Lost(_) if doing.explained => continue,
                Watched::Lost(why) => format!("the device is lost: {why}"),
                Watched::Hangs => format!("hangs: not back from the device after {} s", self.patience.as_secs_f64()),
                Watched::TimeUp => {
                    // That is no kernel's fault.
                    doing.outstanding = None;
                    "killed: the time was up".into()
                }
                Watched::Ended => {
                    let how = if doing.outstanding.is_some() { "faults: " } else { "" };
                    format!("{how}its process ended with {end}")
                }
            };
            self.bury(&mut doing, why)?;
            // A process that did not even begin would not another time.
            if !doing.began || Instant::now() >= self.deadline {
                return Ok(());
            }
        }
    }

    /// Takes up the end of a process that did not end by itself.
    fn bury(&mut self, doing: &mut Doing, why: String) -> Outcome<()> {
        let Some(run) = doing.run.take() else {
            let incident = self.incident("its process", None, why);
            return self.end(vec![], Some(incident));
        };
        self.summary().reached = doing.next.item;
        let name = format!("{} {}", run.name, run.dtype);
        let (kernel, what) = match doing.outstanding.take() {
            Some((_, Some(kernel))) => (Some(kernel.clone()), format!("kernel {kernel}: {why}")),
            Some((_, None)) => (None, format!("a graph: {why}")),
            None => (None, why.clone()),
        };
        let incident = self.incident(name, kernel, why);
        self.end(vec![Row { what, ..run }], Some(incident))
    }

    fn spawn(&self, section: Section, from: At) -> Outcome<Child> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--tell").args(["--device", &self.args.device.to_string()]);
        command.arg("--emulation").arg(&self.emulation).arg("--data").arg(&self.data);
        if !self.args.cases.is_empty() {
            command.args(["--cases", &self.args.cases.join("|")]);
        }
        for (is_set, flag) in [(self.args.subset, "--subset"), (self.args.keep_going, "--keep-going")] {
            command.args(is_set.then_some(flag));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let start = Start { section: section.name(), from, seconds: left.as_secs_f64(), known: self.known.clone() };
        let line = serde_json::to_string(&start)? + "\n";
        // Stays open as long as this process lives. One that died at once is seen in `watch`.
        if let Some(stdin) = &mut child.stdin {
            let _ = stdin.write_all(line.as_bytes());
        }
        Ok(child)
    }

    /// Takes up what a process reports until it is done or given up.
    fn watch(&mut self, child: &mut Child, doing: &mut Doing) -> Outcome<Watched> {
        let events = events(child);
        loop {
            match events.recv_timeout(Duration::from_millis(100)) {
                Ok(Event::Done) => return Ok(Watched::Done),
                Ok(event) => {
                    if let Some(why) = self.take(event, doing)? {
                        return Ok(Watched::Lost(why));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(Watched::Ended),
                Err(RecvTimeoutError::Timeout) => {
                    if doing.outstanding.as_ref().is_some_and(|(since, _)| since.elapsed() > self.patience) {
                        return Ok(Watched::Hangs);
                    }
                    if Instant::now() > self.deadline + GRACE {
                        return Ok(Watched::TimeUp);
                    }
                }
            }
        }
    }
}

/// How a process ended: dead or done, it is waited for, so that it holds the device no longer.
fn end(child: &mut Child) -> Outcome<String> {
    let _ = child.kill();
    let since = Instant::now();
    while since.elapsed() < GRACE {
        if let Some(status) = child.try_wait()? {
            return Ok(status.to_string());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // The driver has it; the device may be lost to all others too.
    Ok(format!("nothing: it was killed {} s ago and is still there", GRACE.as_secs()))
}

enum Watched {
    Done,
    Lost(String),
    Hangs,
    TimeUp,
    Ended,
}

/// What a process prints, as it comes.
fn events(child: &mut Child) -> Receiver<Event> {
    let (sender, receiver) = channel();
    if let Some(out) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let Ok(event) = serde_json::from_str(&line) else { continue };
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}

/// Runs a section as requested on stdin, and prints its events, a line of JSON each.
pub fn tell(args: &Args, data: &Path, emulation: PathBuf) -> Outcome<()> {
    section::quiet_panics();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let Start { section, from, seconds, known } = serde_json::from_str(&line)?;
    // The parent process has ended when stdin ends; a kernel that hangs must not hold the device then.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    let deadline = Instant::now() + Duration::from_secs_f64(seconds);
    let device = match Device::open(&args.device, || emulation) {
        Ok(device) => device.telling(print),
        Err(error) => {
            print(&Event::Lost(error.to_string()));
            return Ok(());
        }
    };
    device.kernels.borrow_mut().known = known;
    let section = Section::named(&section).ok_or_else(|| format!("there is no section '{section}'"))?;
    let span = Span { from, deadline, keep_going: args.keep_going };
    section::run(&section.name(), &section.items(args, data), span, &device, &mut |event| print(&event));
    // What the device still holds after a fault is the driver's to free.
    std::mem::forget(device);
    Ok(())
}

fn print(event: &Event) {
    let line = serde_json::to_string(event).unwrap_or_default() + "\n";
    let mut out = std::io::stdout().lock();
    if out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_err() {
        // The parent has closed the pipe.
        std::process::exit(1);
    }
}

/// What a kernel may take where nothing else is asked for: on a GPU none of the check needs a second.
fn patience(device: &Choice) -> Duration {
    Duration::from_secs(if *device == Choice::Emulated { 300 } else { 8 })
}
