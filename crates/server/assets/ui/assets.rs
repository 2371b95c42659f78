//! The files of the built page. Written by `vite build` in `ui/`; not to be edited by hand.

use super::Asset;

/// Every file, by path.
#[rustfmt::skip]
pub(super) const ASSETS: &[Asset] = &[
    Asset { path: "/assets/KaTeX_AMS-Regular-BQhdFMY1.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_AMS-Regular-BQhdFMY1.woff2") },
    Asset { path: "/assets/KaTeX_Caligraphic-Bold-Dq_IR9rO.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Caligraphic-Bold-Dq_IR9rO.woff2") },
    Asset { path: "/assets/KaTeX_Caligraphic-Regular-Di6jR-x-.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Caligraphic-Regular-Di6jR-x-.woff2") },
    Asset { path: "/assets/KaTeX_Fraktur-Bold-CL6g_b3V.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Fraktur-Bold-CL6g_b3V.woff2") },
    Asset { path: "/assets/KaTeX_Fraktur-Regular-CTYiF6lA.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Fraktur-Regular-CTYiF6lA.woff2") },
    Asset { path: "/assets/KaTeX_Main-Bold-Cx986IdX.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Main-Bold-Cx986IdX.woff2") },
    Asset { path: "/assets/KaTeX_Main-BoldItalic-DxDJ3AOS.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Main-BoldItalic-DxDJ3AOS.woff2") },
    Asset { path: "/assets/KaTeX_Main-Italic-NWA7e6Wa.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Main-Italic-NWA7e6Wa.woff2") },
    Asset { path: "/assets/KaTeX_Main-Regular-B22Nviop.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Main-Regular-B22Nviop.woff2") },
    Asset { path: "/assets/KaTeX_Math-BoldItalic-CZnvNsCZ.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Math-BoldItalic-CZnvNsCZ.woff2") },
    Asset { path: "/assets/KaTeX_Math-Italic-t53AETM-.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Math-Italic-t53AETM-.woff2") },
    Asset { path: "/assets/KaTeX_SansSerif-Bold-D1sUS0GD.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_SansSerif-Bold-D1sUS0GD.woff2") },
    Asset { path: "/assets/KaTeX_SansSerif-Italic-C3H0VqGB.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_SansSerif-Italic-C3H0VqGB.woff2") },
    Asset { path: "/assets/KaTeX_SansSerif-Regular-DDBCnlJ7.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_SansSerif-Regular-DDBCnlJ7.woff2") },
    Asset { path: "/assets/KaTeX_Script-Regular-D3wIWfF6.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Script-Regular-D3wIWfF6.woff2") },
    Asset { path: "/assets/KaTeX_Size1-Regular-mCD8mA8B.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Size1-Regular-mCD8mA8B.woff2") },
    Asset { path: "/assets/KaTeX_Size2-Regular-Dy4dx90m.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Size2-Regular-Dy4dx90m.woff2") },
    Asset { path: "/assets/KaTeX_Size3-Regular-gV2CO0n9.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Size3-Regular-gV2CO0n9.woff2") },
    Asset { path: "/assets/KaTeX_Size4-Regular-Dl5lxZxV.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Size4-Regular-Dl5lxZxV.woff2") },
    Asset { path: "/assets/KaTeX_Typewriter-Regular-CO6r4hn1.woff2", content_type: "font/woff2", bytes: include_bytes!("assets/KaTeX_Typewriter-Regular-CO6r4hn1.woff2") },
    Asset { path: "/assets/icon-C6Dfq24E.svg", content_type: "image/svg+xml", bytes: include_bytes!("assets/icon-C6Dfq24E.svg") },
    Asset { path: "/assets/index-D9_QW1Kl.css", content_type: "text/css; charset=utf-8", bytes: include_bytes!("assets/index-D9_QW1Kl.css") },
    Asset { path: "/assets/index-c0tjb7PA.js", content_type: "text/javascript; charset=utf-8", bytes: include_bytes!("assets/index-c0tjb7PA.js") },
    Asset { path: "/assets/rich-CRvgexA0.js", content_type: "text/javascript; charset=utf-8", bytes: include_bytes!("assets/rich-CRvgexA0.js") },
    Asset { path: "/assets/rich-DZ_-iTOH.css", content_type: "text/css; charset=utf-8", bytes: include_bytes!("assets/rich-DZ_-iTOH.css") },
    Asset { path: "/index.html", content_type: "text/html; charset=utf-8", bytes: include_bytes!("index.html") },
    Asset { path: "/licenses.txt", content_type: "text/plain; charset=utf-8", bytes: include_bytes!("licenses.txt") },
];
