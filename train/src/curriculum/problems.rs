//! The next problem: a task by its weight, at the difficulty it has reached.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::{CurriculumError, PassRates, in_range};
use crate::data::training_problem;
use crate::tasks::{self, Draw, MAX_DIFFICULTY, Problem, Task, text_hash};

/// One task of the mixture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaskSettings {
    /// How often it is drawn, relative to the others.
    pub weight: f64,
    /// The difficulty it begins at, 1 or above.
    pub min: u8,
    /// The difficulty it rises to, at most 10.
    pub max: u8,
}

impl Default for TaskSettings {
    fn default() -> Self {
        Self { weight: 1.0, min: 1, max: 5 }
    }
}

/// The `[curriculum]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CurriculumSettings {
    /// The mixture; a task that is not named is left out.
    pub tasks: BTreeMap<String, TaskSettings>,
    /// A task rises by one difficulty when the mean pass rate of its recent groups is above this.
    pub raise_above: f64,
    /// How many recent groups of a task that mean is over. The count begins anew at each difficulty.
    pub groups: usize,
    /// A problem whose measured pass rate is at least this is not drawn again; ScaleRL has 0.9. Absent: every problem
    /// may come again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retire_at: Option<f64>,
    /// Which groups are learned from.
    pub filter: PassRates,
}

impl Default for CurriculumSettings {
    /// Every task from difficulty 1 to 5.
    fn default() -> Self {
        Self {
            tasks: tasks::all().iter().map(|task| (task.name().to_string(), TaskSettings::default())).collect(),
            raise_above: 0.8,
            groups: 16,
            retire_at: None,
            filter: PassRates::default(),
        }
    }
}

/// How far one task has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Level {
    /// Of the problems drawn now.
    pub difficulty: u8,
    /// Pass rates of the last groups at this difficulty, the oldest first.
    pub recent: VecDeque<f32>, // f32: JSON gives an f64 back to its last digit but one
}

/// How far the run has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CurriculumState {
    /// By task; a task that is not in it is at its lowest difficulty.
    pub tasks: BTreeMap<String, Level>,
    /// [`text_hash`] of "task key" of the problems that are not drawn again.
    pub retired: BTreeSet<u64>,
}

/// Settings that were found good, with their tasks.
pub struct Curriculum {
    settings: CurriculumSettings,
    tasks: Vec<(&'static dyn Task, TaskSettings)>,
}

fn hash(problem: &Problem) -> u64 {
    text_hash(&format!("{} {}", problem.task, problem.key))
}

impl Curriculum {
    /// # Errors
    /// What is wrong with the settings, by field.
    pub fn new(settings: CurriculumSettings) -> Result<Self, CurriculumError> {
        let mut tasks = Vec::new();
        for (name, &task) in &settings.tasks {
            if !(task.weight >= 0.0 && task.weight.is_finite()) {
                return Err(CurriculumError::Weights);
            }
            if !(1 <= task.min && task.min <= task.max && task.max <= MAX_DIFFICULTY) {
                return Err(CurriculumError::Difficulties { task: name.clone(), min: task.min, max: task.max });
            }
            let Some(found) = tasks::by_name(name) else {
                let known = tasks::all().iter().map(|task| task.name()).collect::<Vec<_>>().join(", ");
                return Err(CurriculumError::UnknownTask { name: name.clone(), known });
            };
            tasks.push((found, task));
        }
        if tasks.iter().all(|(_, task)| task.weight == 0.0) {
            return Err(CurriculumError::Weights);
        }
        let unit = 0.0..=1.0;
        let threshold = settings.raise_above;
        in_range("curriculum.raise_above", threshold, unit.contains(&threshold), "0 to 1 (1 never raises)")?;
        in_range("curriculum.groups", settings.groups as f64, settings.groups > 0, "1 or above")?;
        if let Some(rate) = settings.retire_at {
            in_range("curriculum.retire_at", rate, rate > 0.0 && rate <= 1.0, "above 0, at most 1")?;
        }
        settings.filter.validate()?;
        Ok(Self { settings, tasks })
    }

    /// The settings.
    pub fn settings(&self) -> &CurriculumSettings {
        &self.settings
    }

    /// The difficulty that a task is at. A state from other settings is brought within this one's bounds.
    fn difficulty(&self, state: &CurriculumState, name: &str, task: &TaskSettings) -> u8 {
        state.tasks.get(name).map_or(task.min, |level| level.difficulty).clamp(task.min, task.max)
    }

    /// The problem number `index` of the stream `seed` as things stand; always on the training side of the data's
    /// split. Where all problems of a difficulty seem retired, it is the next difficulty's, and failing that any.
    ///
    /// # Errors
    /// No training problem at all.
    pub fn problem(&self, state: &CurriculumState, seed: u64, index: u64) -> Result<Problem, CurriculumError> {
        let weights: Vec<f64> = self.tasks.iter().map(|(_, task)| task.weight).collect();
        let (task, settings) = self.tasks[Draw::new(seed, index, "curriculum").weighted(&weights)];
        let from = self.difficulty(state, task.name(), &settings);
        let search = |fit: &dyn Fn(&Problem) -> bool| {
            (from..=MAX_DIFFICULTY)
                .find_map(|difficulty| training_problem(task, "curriculum", seed, index, difficulty, fit))
        };
        search(&|problem| !state.retired.contains(&hash(problem)))
            .or_else(|| search(&|_| true))
            .ok_or_else(|| CurriculumError::NoProblem { task: task.name().into(), difficulty: from })
    }

    /// Takes in that `pass_rate` (0 to 1) of the responses to a problem were right. Call it for every measured group,
    /// in a fixed order, those that the filter drops included. A rate that is no number is left out.
    pub fn observe(&self, state: &mut CurriculumState, problem: &Problem, pass_rate: f64) {
        if !pass_rate.is_finite() {
            return;
        }
        if self.settings.retire_at.is_some_and(|rate| pass_rate >= rate) {
            state.retired.insert(hash(problem));
        }
        let Some((_, settings)) = self.tasks.iter().find(|(task, _)| task.name() == problem.task) else { return };
        let difficulty = self.difficulty(state, problem.task, settings);
        // What was drawn before a rise says nothing about the difficulty after it.
        if problem.difficulty != difficulty {
            return;
        }
        let begin = || Level { difficulty, recent: VecDeque::new() };
        let level = state.tasks.entry(problem.task.into()).or_insert_with(begin);
        level.difficulty = difficulty;
        level.recent.push_back(pass_rate as f32);
        while level.recent.len() > self.settings.groups {
            level.recent.pop_front();
        }
        let mean = level.recent.iter().map(|&rate| f64::from(rate)).sum::<f64>() / level.recent.len() as f64;
        let full = level.recent.len() == self.settings.groups;
        if full && mean > self.settings.raise_above && difficulty < settings.max {
            *level = Level { difficulty: difficulty + 1, recent: VecDeque::new() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::is_held_out;

    fn two() -> CurriculumSettings {
        let tasks = [("addition", 3.0, 1, 3), ("clock", 1.0, 2, 4)];
        let tasks = tasks.map(|(name, weight, min, max)| (name.to_string(), TaskSettings { weight, min, max }));
        CurriculumSettings { tasks: tasks.into(), groups: 4, raise_above: 0.75, ..CurriculumSettings::default() }
    }

    fn of_task(c: &Curriculum, state: &CurriculumState, name: &str) -> Problem {
        (0..).map(|index| c.problem(state, 1, index).unwrap()).find(|problem| problem.task == name).unwrap()
    }

    #[test]
    fn problems_depend_on_seed_index_and_state_alone() {
        let c = Curriculum::new(two()).unwrap();
        let mut state = CurriculumState::default();
        let draw = |state: &CurriculumState, seed| {
            (0..400).map(|index| c.problem(state, seed, index).unwrap()).collect::<Vec<_>>()
        };
        let first = draw(&state, 5);
        assert_eq!(first, draw(&state, 5));
        assert_ne!(first, draw(&state, 6));
        assert!(first.iter().all(|problem| !is_held_out(problem)));
        let additions = first.iter().filter(|problem| problem.task == "addition").count();
        assert!((260..340).contains(&additions), "{additions} of 400, expected 300");
        assert!(first.iter().all(|p| p.difficulty == if p.task == "addition" { 1 } else { 2 }));
        // A state that went through a checkpoint draws the same.
        state.tasks.insert("addition".into(), Level { difficulty: 3, recent: [0.125, 0.3].into() });
        state.retired.insert(u64::MAX);
        let text = serde_json::to_string(&state).unwrap();
        let resumed: CurriculumState = serde_json::from_str(&text).unwrap();
        assert_eq!(resumed, state);
        assert_eq!(draw(&state, 5), draw(&resumed, 5));
        assert!(draw(&state, 5).iter().all(|p| p.difficulty == if p.task == "addition" { 3 } else { 2 }));
    }

    #[test]
    fn a_task_rises_when_its_window_is_full_and_solved() {
        let c = Curriculum::new(two()).unwrap();
        let mut state = CurriculumState::default();
        let addition = of_task(&c, &state, "addition");
        // Not before the window is full, and not at the threshold itself.
        for rate in [1.0, 1.0, 1.0] {
            c.observe(&mut state, &addition, rate);
            assert_eq!(state.tasks["addition"].difficulty, 1);
        }
        c.observe(&mut state, &addition, 0.0);
        assert_eq!(state.tasks["addition"].difficulty, 1, "a mean of 0.75 is not above 0.75");
        // The oldest leaves: 1, 1, 0, 1.
        c.observe(&mut state, &addition, 1.0);
        assert_eq!(state.tasks["addition"].recent, [1.0, 1.0, 0.0, 1.0]);
        for _ in 0..3 {
            c.observe(&mut state, &addition, 1.0);
        }
        assert_eq!(state.tasks["addition"], Level { difficulty: 2, recent: VecDeque::new() });
        assert!(!state.tasks.contains_key("clock"), "each task for itself");
        // Groups from before the rise do not count.
        c.observe(&mut state, &addition, 1.0);
        assert_eq!(state.tasks["addition"].recent.len(), 0);
        let second = of_task(&c, &state, "addition");
        c.observe(&mut state, &second, f64::NAN);
        assert_eq!(state.tasks["addition"].recent.len(), 0);
        // Up to the highest and no further.
        for _ in 0..20 {
            let addition = of_task(&c, &state, "addition");
            c.observe(&mut state, &addition, 1.0);
        }
        assert_eq!(state.tasks["addition"].difficulty, 3);
    }

    #[test]
    fn a_resumed_state_goes_on_as_the_uninterrupted() {
        let c = Curriculum::new(CurriculumSettings { retire_at: Some(0.9), ..two() }).unwrap();
        let run = |stop: Option<u64>| {
            let mut state = CurriculumState::default();
            let mut problems = Vec::new();
            for index in 0..60 {
                if Some(index) == stop {
                    state = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
                }
                let problem = c.problem(&state, 9, index).unwrap();
                c.observe(&mut state, &problem, 1.0 - (index % 3) as f64 / 10.0);
                problems.push(problem);
            }
            (problems, state)
        };
        assert_eq!(run(None), run(Some(31)));
    }

    #[test]
    fn what_is_solved_does_not_come_again() {
        let c = Curriculum::new(CurriculumSettings { retire_at: Some(0.9), ..two() }).unwrap();
        let mut state = CurriculumState::default();
        for index in 0..40 {
            let problem = c.problem(&state, 1, index).unwrap();
            c.observe(&mut state, &problem, 0.5);
            assert_eq!(problem, c.problem(&state, 1, index).unwrap(), "0.5 retires nothing");
            c.observe(&mut state, &problem, 0.9);
            let other = c.problem(&state, 1, index).unwrap();
            assert_ne!(hash(&problem), hash(&other));
            assert!(!is_held_out(&other));
        }
    }

    #[test]
    fn a_difficulty_used_up_gives_the_next_one() {
        let c = Curriculum::new(CurriculumSettings { retire_at: Some(1.0), ..two() }).unwrap();
        let mut state = CurriculumState::default();
        // Everything that single digits add up to, and more draws than it takes to meet them all.
        let task = tasks::by_name("addition").unwrap();
        state.retired = (0..20_000).map(|index| hash(&task.generate(3, index, 1))).collect();
        let problem = of_task(&c, &state, "addition");
        assert!(problem.difficulty > 1 && !state.retired.contains(&hash(&problem)), "{problem:?}");
    }

    #[test]
    fn mistakes_name_their_field() {
        let told = |change: &dyn Fn(&mut CurriculumSettings)| {
            let mut settings = two();
            change(&mut settings);
            Curriculum::new(settings).err().unwrap().to_string()
        };
        let add = |s: &mut CurriculumSettings, name: &str, weight, min, max| {
            s.tasks.insert(name.into(), TaskSettings { weight, min, max });
        };
        assert!(told(&|s| add(s, "chess", 1.0, 1, 5)).contains("\"chess\"; there are addition, "));
        assert!(told(&|s| add(s, "boolean", 1.0, 0, 5)).contains("curriculum.tasks.boolean: difficulties 0 to 5"));
        assert!(told(&|s| add(s, "boolean", 1.0, 4, 3)).contains("4 to 3"));
        assert!(told(&|s| add(s, "boolean", 1.0, 4, 11)).contains("4 to 11"));
        assert!(told(&|s| add(s, "boolean", f64::NAN, 1, 5)).contains("weights"));
        assert!(told(&|s| s.tasks.clear()).contains("weights"));
        assert!(told(&|s| s.groups = 0).contains("curriculum.groups = 0"));
        assert!(told(&|s| s.raise_above = 1.5).contains("curriculum.raise_above = 1.5"));
        assert!(told(&|s| s.raise_above = f64::NAN).contains("raise_above"));
        assert!(told(&|s| s.retire_at = Some(0.0)).contains("curriculum.retire_at"));
        assert!(told(&|s| s.filter.below = 0.0).contains("curriculum.filter"));
        assert!(Curriculum::new(CurriculumSettings::default()).is_ok());
        let read = serde_json::from_str::<CurriculumSettings>;
        let some = read(r#"{"tasks": {"clock": {"max": 3}}, "retire_at": 0.9}"#).unwrap();
        assert_eq!(some.tasks["clock"], TaskSettings { weight: 1.0, min: 1, max: 3 });
        assert!(read(r#"{"tasks": {"clock": {"maximum": 3}}}"#).unwrap_err().to_string().contains("maximum"));
    }
}
