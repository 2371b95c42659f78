//! Video files: read and decoded by ffmpeg in a child process, which the program puts into a sandbox. A broken decoder then
//! costs a child. The file is handed over in memory; frames come back one by one, as PPM on a pipe.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;
use spark_vision::{ImageSize, RgbImage};

use super::source::Payload;
use crate::ApiError;

/// What a shell, and the program's sandbox, end with when there is no such program.
const NOT_FOUND: i32 = 127;
/// Most bytes that ffprobe may write about a file.
const MAX_REPORT_BYTES: usize = 1 << 20;
/// Most pixels of a frame: what images may have.
const MAX_PIXELS: &str = "67108864";
/// What is decoded: formats that cameras and browsers write. Old and rare decoders are where the defects are.
const CODECS: &str = "h264,hevc,vp8,libvpx,vp9,libvpx-vp9,av1,libdav1d,libaom-av1,mpeg4,mpeg2video,mpeg1video,mjpeg,gif,theora,h263,prores";
/// The file, as the child sees it: it can be read from any place, unlike a pipe.
const INPUT: &str = "/dev/stdin";

/// How ffmpeg is run.
#[derive(Debug, Clone)]
pub struct VideoDecoder {
    /// A command that limits itself and becomes the command that follows it: `ffmpeg` or `ffprobe` with arguments. Status
    /// 127 means that there is no such program.
    pub sandbox: Vec<OsString>,
    /// Until a video is read.
    pub timeout: Duration,
}

/// A video file.
pub(super) struct Clip {
    payload: Payload,
    demuxer: &'static str,
    decoder: VideoDecoder,
}

/// What the header says.
pub(super) struct ClipInfo {
    pub(super) num_frames: usize,
    pub(super) fps: f64,
    /// Of a frame as it is shown: turned as the file says.
    pub(super) size: ImageSize,
}

impl Clip {
    /// A file of a known format, known by its first bytes. Lists of other files are none of these.
    pub(super) fn open(decoder: Option<&VideoDecoder>, payload: Payload) -> Result<Self, ApiError> {
        let demuxer = demuxer(&payload.bytes).ok_or_else(|| {
            refuse("the format of the video is not supported: send MP4, WebM, Matroska, AVI, MPEG, FLV, Ogg or GIF")
        })?;
        let Some(decoder) = decoder.cloned() else { return Err(not_here()) };
        Ok(Self { payload, demuxer, decoder })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.payload.bytes
    }

    /// Reads the header and counts the frames; decodes nothing.
    pub(super) fn info(&self) -> Result<ClipInfo, ApiError> {
        let fields =
            "stream=width,height,avg_frame_rate,r_frame_rate,nb_read_packets:stream_side_data=rotation";
        let args = ["-select_streams", "v:0", "-count_packets", "-show_entries", fields, "-of", "json"];
        let mut report = Vec::new();
        let mut run = self.run("ffprobe", &[], &args)?;
        run.read_all(&mut |piece| {
            report.extend_from_slice(piece);
            if report.len() > MAX_REPORT_BYTES { Err(damaged()) } else { Ok(()) }
        })?;
        let report: Value = serde_json::from_slice(&report).map_err(|_| damaged())?;
        let stream = report["streams"].get(0).ok_or_else(|| refuse("the video file has no picture in it"))?;
        let side = |name: &str| stream[name].as_u64().map(|side| usize::try_from(side).unwrap_or(usize::MAX));
        let (Some(width), Some(height)) = (side("width"), side("height")) else { return Err(damaged()) };
        let count = stream["nb_read_packets"].as_str().and_then(|text| text.parse().ok()).unwrap_or(0);
        let rate = |name: &str| stream[name].as_str().and_then(parse_rate);
        let fps = rate("avg_frame_rate").or_else(|| rate("r_frame_rate")).ok_or_else(damaged)?;
        if count == 0 {
            return Err(refuse("the video has no frame that can be decoded"));
        }
        let rotation = stream["side_data_list"].as_array().into_iter().flatten();
        let turns = rotation
            .filter_map(|data| data["rotation"].as_i64())
            .any(|degrees| degrees.rem_euclid(180) == 90);
        let size =
            if turns { ImageSize { width: height, height: width } } else { ImageSize { width, height } };
        Ok(ClipInfo { num_frames: count, fps, size })
    }

    /// Gives the frames of `indices` (ascending) to `take`, as far as the file has them.
    pub(super) fn frames(
        &self,
        indices: &[usize],
        take: &mut dyn FnMut(&RgbImage) -> Result<(), ApiError>,
    ) -> Result<(), ApiError> {
        // The chosen frames are numbered anew, so that none is dropped or doubled for the sake of an even rate.
        let filter = format!("select='{}',settb=1/25,setpts=N", one_of(indices));
        let count = indices.len().to_string();
        let args = [
            "-map",
            "0:v:0",
            "-an",
            "-sn",
            "-dn",
            "-vf",
            &filter,
            "-r",
            "25",
            "-frames:v",
            &count,
            "-f",
            "image2pipe",
            "-c:v",
            "ppm",
            "-pix_fmt",
            "rgb24",
            "pipe:1",
        ];
        let mut run = self.run("ffmpeg", &["-nostdin", "-threads", "1"], &args)?;
        let mut reader = FrameReader::default();
        run.read_all(&mut |piece| reader.push(piece, take))
    }

    /// Starts one of the two programs with the file as its input; `args` follow the input.
    fn run(&self, program: &str, first: &[&str], args: &[&str]) -> Result<Run, ApiError> {
        let mut words = self.decoder.sandbox.iter();
        let mut command = match words.next() {
            Some(sandbox) => Command::new(sandbox),
            None => return Err(not_here()),
        };
        command.args(words).arg(program).args(["-v", "error", "-hide_banner"]).args(first);
        command.args(["-protocol_whitelist", "file,pipe", "-format_whitelist", self.demuxer]);
        command.args(["-codec_whitelist", CODECS, "-max_pixels", MAX_PIXELS, "-f", self.demuxer]);
        command.args(["-i", INPUT]).args(args);
        let input = in_memory(&self.payload.bytes).map_err(|error| ApiError::internal(&error))?;
        let child =
            command.stdin(Stdio::from(input)).stdout(Stdio::piped()).stderr(Stdio::null()).env_clear();
        let child = child.envs(std::env::var_os("PATH").map(|path| ("PATH", path))).spawn();
        let child =
            child.map_err(|error| ApiError::internal(&format!("starting the video decoder: {error}")))?;
        Ok(Run { child, deadline: Instant::now() + self.decoder.timeout })
    }
}

/// A child at work. It is killed when this is dropped.
struct Run {
    child: Child,
    deadline: Instant,
}

impl Run {
    /// Gives all that the child writes to `take`, until it ends. Fails when it writes too long, or ends with an error.
    fn read_all(&mut self, take: &mut dyn FnMut(&[u8]) -> Result<(), ApiError>) -> Result<(), ApiError> {
        let pipe = self.child.stdout.take().ok_or_else(|| broken(&"no pipe"))?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            self.wait_for(&pipe)?;
            match rustix::io::read(&pipe, &mut buffer) {
                Ok(0) => break,
                Ok(len) => take(&buffer[..len])?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(broken(&error)),
            }
        }
        // Its output is closed, so it ends now; what does not is killed with the rest.
        let child = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty());
        self.wait_for(&child.map_err(|error| broken(&error))?)?;
        match self.child.wait().map_err(|error| broken(&error))?.code() {
            Some(0) => Ok(()),
            Some(NOT_FOUND) => Err(not_here()),
            status => {
                tracing::debug!("the video decoder ended with status {status:?}");
                Err(damaged())
            }
        }
    }

    /// Waits until `fd` can be read, as long as there is time.
    fn wait_for(&self, fd: &impl AsFd) -> Result<(), ApiError> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|error| broken(&error))?;
            match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => {
                    return Err(refuse("the video takes too long to decode: send a shorter or smaller one"));
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(broken(&error)),
            }
        }
    }
}

fn broken(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::internal(&format!("reading from the video decoder: {error}"))
}

impl Drop for Run {
    fn drop(&mut self) {
        // It may have ended: then both do nothing.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Takes a stream of PPM files apart, keeping one frame at a time.
#[derive(Default)]
struct FrameReader {
    pending: Vec<u8>,
}

impl FrameReader {
    fn push(
        &mut self,
        piece: &[u8],
        take: &mut dyn FnMut(&RgbImage) -> Result<(), ApiError>,
    ) -> Result<(), ApiError> {
        self.pending.extend_from_slice(piece);
        while let Some((width, height, start)) = ppm_header(&self.pending)? {
            let len = width.saturating_mul(height).saturating_mul(3);
            let Some(pixels) = self.pending.get(start..start.saturating_add(len)) else { return Ok(()) };
            let frame = RgbImage::new(height, width, pixels.to_vec()).ok_or_else(damaged)?;
            self.pending.drain(..start + len);
            take(&frame)?;
        }
        Ok(())
    }
}

/// Width, height and where the pixels begin, once the whole header is there: `P6`, width, height, 255, each with one white
/// space behind it.
fn ppm_header(bytes: &[u8]) -> Result<Option<(usize, usize, usize)>, ApiError> {
    const LONGEST: usize = 64;
    let head = &bytes[..bytes.len().min(LONGEST)];
    let mut at = 0;
    let mut words = [""; 4];
    for word in &mut words {
        let Some(len) = head[at..].iter().position(u8::is_ascii_whitespace) else {
            return if head.len() == LONGEST { Err(damaged()) } else { Ok(None) };
        };
        *word = std::str::from_utf8(&head[at..at + len]).map_err(|_| damaged())?;
        at += len + 1;
    }
    match (words[0], words[1].parse(), words[2].parse(), words[3]) {
        ("P6", Ok(width), Ok(height), "255") => Ok(Some((width, height, at))),
        _ => Err(damaged()),
    }
}

/// An expression of ffmpeg's that is 1 for the frames of `indices`. Halved again and again: a plain sum of many is too deep
/// for its parser.
fn one_of(indices: &[usize]) -> String {
    match indices {
        [] => "0".to_owned(),
        [index] => format!("eq(n,{index})"),
        [first, ..] => {
            let (low, high) = indices.split_at(indices.len() / 2);
            let middle = high.first().unwrap_or(first);
            format!("if(lt(n,{middle}),{},{})", one_of(low), one_of(high))
        }
    }
}

/// A frame rate such as `30000/1001`.
fn parse_rate(text: &str) -> Option<f64> {
    let (above, below) = text.split_once('/')?;
    let rate = above.parse::<f64>().ok()? / below.parse::<f64>().ok()?;
    (rate.is_finite() && rate > 0.0).then_some(rate)
}

/// The name that ffmpeg has for the format of a file, by its first bytes.
fn demuxer(bytes: &[u8]) -> Option<&'static str> {
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    let boxes: [&[u8]; 5] = [b"ftyp", b"moov", b"mdat", b"wide", b"free"];
    match bytes.get(4..8) {
        Some(name) if boxes.contains(&name) => Some("mov"),
        _ if starts(b"\x1a\x45\xdf\xa3") => Some("matroska"),
        _ if starts(b"RIFF") && bytes.get(8..12) == Some(b"AVI ") => Some("avi"),
        _ if starts(b"GIF87a") || starts(b"GIF89a") => Some("gif"),
        _ if starts(b"FLV\x01") => Some("flv"),
        _ if starts(b"OggS") => Some("ogg"),
        _ if starts(b"\0\0\x01\xba") => Some("mpeg"),
        _ if starts(b"\x47") && bytes.get(188) == Some(&0x47) => Some("mpegts"),
        _ => None,
    }
}

/// A file that exists in memory alone and cannot be changed.
fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create("video", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    io::Seek::rewind(&mut file)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

fn refuse(rule: &str) -> ApiError {
    ApiError::field("video_url", rule)
}

fn damaged() -> ApiError {
    refuse("the video file is damaged, or of a kind that is not supported")
}

fn not_here() -> ApiError {
    refuse(
        "this server cannot decode video files (it has no ffmpeg): send frames, as data:video/jpeg;base64,FRAME,FRAME,...",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::source::Budget;

    #[test]
    fn frames_are_found_however_the_stream_is_cut() {
        let mut stream = Vec::new();
        for level in [1u8, 2, 3] {
            stream.extend(b"P6\n2 1\n255\n");
            stream.extend([level; 6]);
        }
        for cut in 1..stream.len() {
            let mut reader = FrameReader::default();
            let mut levels = Vec::new();
            for piece in stream.chunks(cut) {
                reader
                    .push(piece, &mut |frame| {
                        levels.push((frame.width(), frame.height(), frame.pixels()[5]));
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(levels, [(2, 1, 1), (2, 1, 2), (2, 1, 3)], "pieces of {cut}");
        }
    }

    #[test]
    fn other_streams_are_errors() {
        for stream in
            [&b"P5\n2 1\n255\n"[..], b"P6\n0 1\n255\n", b"P6\n-1 1\n255\n", b"P6\n2 1\n65535\n", &[b'x'; 100]]
        {
            assert!(FrameReader::default().push(stream, &mut |_| Ok(())).is_err());
        }
        // A claim of more than there can be waits for bytes that do not come, and takes no memory for them.
        let claim = b"P6\n99999999999 99999999999\n255\n";
        FrameReader::default().push(claim, &mut |_| panic!("a frame of nothing")).unwrap();
    }

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        assert_eq!(demuxer(b"\0\0\0\x18ftypmp42"), Some("mov"));
        assert_eq!(demuxer(b"\x1a\x45\xdf\xa3"), Some("matroska"));
        for list in [
            &b"#EXTM3U\n"[..],
            b"ffconcat version 1.0\n",
            b"",
            b"RIFF\0\0\0\0WAVE",
            b"\x89PNG\r\n\x1a\n",
            b"v=0\r\n",
        ] {
            assert_eq!(demuxer(list), None);
        }
        assert_eq!(parse_rate("30000/1001").map(f64::round), Some(30.0));
        assert!(
            [parse_rate("0/0"), parse_rate("1/0"), parse_rate("-1/1"), parse_rate("25")]
                .iter()
                .all(Option::is_none)
        );
    }

    /// A clip whose decoder is a shell script.
    fn clip(script: &str, timeout: Duration) -> Clip {
        let sandbox = ["/bin/sh", "-c", script].map(OsString::from).to_vec();
        let budget = Budget::new(1000);
        let payload = Payload::held(b"\0\0\0\x18ftyp....".to_vec(), budget.hold());
        Clip::open(Some(&VideoDecoder { sandbox, timeout }), payload).unwrap()
    }

    #[test]
    fn a_decoder_that_misbehaves_costs_one_request() {
        let long = Duration::from_secs(60);
        for (script, timeout, rule) in [
            ("exit 127", long, "no ffmpeg"),
            ("exit 1", long, "damaged"),
            ("kill -SEGV $$", long, "damaged"),
            ("exec cat /dev/zero", long, "damaged"),
            ("echo '{}'", long, "no picture"),
            ("echo '{\"streams\": [{\"width\": 5}]}'", long, "damaged"),
            ("exec sleep 1000", Duration::from_millis(50), "too long"),
            ("exec 1>&-; exec sleep 1000", Duration::from_millis(50), "too long"),
        ] {
            let clip = clip(script, timeout);
            let error = clip.info().err().unwrap_or_else(|| panic!("{script} gave a clip"));
            assert!(error.to_string().contains(rule), "{script}: {error}");
            assert_eq!(error.status(), 400);
            assert!(clip.frames(&[0], &mut |_| Ok(())).is_err() || script.starts_with("echo"), "{script}");
        }
    }

    /// With the ffmpeg of this machine, outside the sandbox, if it has one; the sandbox is the program's, and so are its tests.
    #[test]
    fn the_chosen_frames_of_a_file_are_decoded() {
        assert_eq!(one_of(&[]), "0");
        assert_eq!(one_of(&[1, 4, 9]), "if(lt(n,4),eq(n,1),if(lt(n,9),eq(n,4),eq(n,9)))");
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/video/clip.mp4");
        let budget = Budget::new(1000);
        let payload = Payload::held(std::fs::read(path).unwrap(), budget.hold());
        let decoder = VideoDecoder { sandbox: vec!["/usr/bin/env".into()], timeout: Duration::from_secs(60) };
        let clip = Clip::open(Some(&decoder), payload).unwrap();
        match clip.info() {
            Err(error) => assert!(error.to_string().contains("no ffmpeg"), "{error}"),
            Ok(ClipInfo { num_frames, fps, size }) => {
                assert_eq!((num_frames, fps, size), (30, 10.0, ImageSize { width: 64, height: 48 }));
                // Far more than there are, to see that the filter takes as many as a video may have.
                let indices: Vec<usize> = [0, 6, 12, 17, 23, 29].into_iter().chain(30..792).collect();
                let mut levels = Vec::new();
                clip.frames(&indices, &mut |frame| {
                    levels.push(frame.pixels()[0]);
                    Ok(())
                })
                .unwrap();
                let expected = [0, 48, 96, 136, 184, 232];
                assert_eq!(levels.len(), 6);
                assert!(levels.iter().zip(expected).all(|(got, want)| got.abs_diff(want) <= 1), "{levels:?}");
            }
        }
    }

    #[test]
    fn the_file_is_the_childs_input_and_cannot_be_changed() {
        let file = in_memory(b"abc").unwrap();
        assert!(File::from(file).write_all(b"x").is_err());
        let report = r#"{"streams": [{"width": 4, "height": 2, "avg_frame_rate": "0/0", "r_frame_rate": "10/1",
            "nb_read_packets": "7", "side_data_list": [{"rotation": -90}]}]}"#;
        let script = format!("test \"$(head -c 8 /dev/stdin | tail -c 4)\" = ftyp && echo '{report}'");
        let ClipInfo { num_frames, fps, size } = clip(&script, Duration::from_secs(60)).info().unwrap();
        assert_eq!((num_frames, fps, size), (7, 10.0, ImageSize { width: 2, height: 4 }));
    }
}
