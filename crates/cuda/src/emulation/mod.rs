//! Runs kernels without a GPU, for tests: a module's text is compiled as C++, its threads are fibers, and the few functions that are
//! PTX get bodies that do what the PTX ISA says. All else, every index included, is the kernel's own text. Says nothing of speed, of
//! registers, or of what hardware does otherwise than its definition.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::launch::Params;
use crate::source::{MODULES, ModuleSource};

/// Marks an address in parameters; 8 bits for the buffer follow, 40 for the byte in it.
const ADDRESS: u64 = 0x5eed << 48;

/// A module as a program for this machine.
pub(crate) struct Emulated {
    program: PathBuf,
    _folder: tempfile::TempDir,
}

/// The memory of kernels and what is launched with it.
#[derive(Default)]
pub(crate) struct Work {
    buffers: Vec<Vec<u8>>,
    launches: Vec<u8>,
    num_launches: u64,
}

impl Work {
    /// The address of a buffer with these bytes.
    pub(crate) fn buffer(&mut self, bytes: Vec<u8>) -> u64 {
        self.buffers.push(bytes);
        assert!(self.buffers.len() <= 256);
        ADDRESS | (self.buffers.len() as u64 - 1) << 40
    }

    /// The address of a buffer of words.
    pub(crate) fn words(&mut self, words: impl IntoIterator<Item = u32>) -> u64 {
        self.buffer(words.into_iter().flat_map(u32::to_le_bytes).collect())
    }

    /// The address of a buffer of bytes that no kernel should leave.
    pub(crate) fn room(&mut self, num_bytes: usize) -> u64 {
        self.buffer(vec![0x7f; num_bytes])
    }

    pub(crate) fn launch<P: Params>(&mut self, kernel: &str, grid: [usize; 2], num_threads: u32, params: &P) {
        let put = |out: &mut Vec<u8>, bytes: &[u8]| {
            out.extend((bytes.len() as u64).to_le_bytes());
            out.extend(bytes);
        };
        put(&mut self.launches, kernel.as_bytes());
        for count in [grid[0] as u32, grid[1] as u32, num_threads] {
            self.launches.extend(count.to_le_bytes());
        }
        // SAFETY: parameters have no padding (`Params`), so all their bytes are set.
        let bytes =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast::<u8>(), size_of::<P>()) };
        put(&mut self.launches, bytes);
        self.num_launches += 1;
    }
}

/// The buffers behind all launches.
pub(crate) struct Done(Vec<Vec<u8>>);

impl Done {
    pub(crate) fn bytes(&self, address: u64) -> &[u8] {
        &self.0[(address >> 40 & 0xff) as usize]
    }

    pub(crate) fn words(&self, address: u64) -> Vec<u32> {
        let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.bytes(address).chunks_exact(4).map(word).collect()
    }

    pub(crate) fn floats(&self, address: u64) -> Vec<f32> {
        self.words(address).into_iter().map(f32::from_bits).collect()
    }

    pub(crate) fn bf16s(&self, address: u64) -> Vec<f32> {
        let value = |bytes: &[u8]| half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        self.bytes(address).chunks_exact(2).map(value).collect()
    }
}

impl Emulated {
    /// Compiles the module `name`, of which `kernels` with the parameters of each are used.
    pub(crate) fn new(name: &str, kernels: &[(&str, &str)]) -> Self {
        let module: &ModuleSource = MODULES.iter().find(|module| module.name == name).unwrap();
        let text = module.text().unwrap().replace("extern __shared__", "extern");
        let mut source =
            format!("{}\n{}\n{}\n", include_str!("before.h"), without_ptx(&text), include_str!("after.h"));
        if text.contains("struct Group {") && text.contains("load_group") {
            source.push_str(include_str!("choice.h"));
        }
        source.push_str("const Entry KERNELS[] = {\n");
        for (kernel, params) in kernels {
            let call = format!("[](const void* p) {{ {kernel}(*static_cast<const {params}*>(p)); }}");
            writeln!(source, "    {{\"{kernel}\", {call}}},").unwrap();
        }
        source.push_str("    {nullptr, nullptr}};\n");

        let folder = tempfile::tempdir().unwrap();
        let (file, program) = (folder.path().join("module.cpp"), folder.path().join("module"));
        std::fs::write(&file, source).unwrap();
        let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
        // Products and sums are rounded one by one, as those of the kernel's that matter are.
        compiler.args(["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-o"]).arg(&program).arg(&file);
        compiler.args(module.options().into_iter().filter(|option| option.starts_with("-D")));
        let output = compiler.output().expect("a C++ compiler, `c++` or what CXX names");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { program, _folder: folder }
    }

    /// Runs the launches of `work` in their order.
    pub(crate) fn run(&self, work: &Work) -> Done {
        let mut command = Command::new(&self.program);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut input = (work.buffers.len() as u64).to_le_bytes().to_vec();
        for buffer in &work.buffers {
            input.extend((buffer.len() as u64).to_le_bytes());
            input.extend(buffer);
        }
        input.extend(work.num_launches.to_le_bytes());
        input.extend(&work.launches);
        // A program that fails stops reading: its message says more.
        let _ = child.stdin.take().unwrap().write_all(&input);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        let mut rest = &output.stdout[..];
        let mut take = |buffer: &Vec<u8>| {
            let (bytes, behind) = rest.split_at(buffer.len());
            rest = behind;
            bytes.to_vec()
        };
        Done(work.buffers.iter().map(&mut take).collect())
    }
}

/// The text with a `;` in place of the body of every function that has PTX in it.
fn without_ptx(text: &str) -> String {
    let (mut out, mut depth, mut body, mut before) = (String::new(), 0, 0, ' ');
    for (at, c) in text.char_indices() {
        match c {
            '{' => {
                if depth == 0 {
                    body = at;
                }
                depth += 1;
            }
            '}' => {
                depth -= 1;
                if depth == 0 {
                    let body = &text[body..=at];
                    let has_ptx = body.contains("asm(") || body.contains("asm volatile(");
                    assert!(!has_ptx || before == ')', "PTX outside a function of its own: {body}");
                    out.push_str(if has_ptx { ";" } else { body });
                }
            }
            _ if depth == 0 => {
                out.push(c);
                before = if c.is_whitespace() { before } else { c };
            }
            _ => {}
        }
    }
    out
}

#[test]
fn bodies_with_ptx_are_left_out() {
    let text = "struct A { int b; };\nvoid c(int d) {\n  asm volatile(\"{%0}\" :);\n}\nvoid e() { if (1) { f(); } }\n";
    let want = "struct A { int b; };\nvoid c(int d) ;\nvoid e() { if (1) { f(); } }\n";
    assert_eq!(without_ptx(text), want);
}
