// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ComputeEscrow} from "../src/ComputeEscrow.sol";
import {IVerifier} from "../src/interfaces/IVerifier.sol";
import {IArbiter} from "../src/interfaces/IArbiter.sol";

/// @dev A token that keeps 1 % of each transfer.
contract FeeToken is ERC20 {
    constructor() ERC20("Fee", "FEE") {
        _mint(msg.sender, 1e30);
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (from != address(0) && to != address(0)) super._update(to, address(0xFEE), value / 100);
    }
}

/// @dev A token that calls the escrow back while it is being moved: as a client of its own jobs, and as a creditor.
contract ReentrantToken is ERC20 {
    ComputeEscrow private immutable escrow;
    uint256 public ownJob;
    uint256 public entered;
    uint256 public hooks;
    bool private _inside;

    constructor(ComputeEscrow escrow_) ERC20("Reentrant", "RE") {
        escrow = escrow_;
        _mint(msg.sender, 1e30);
        _mint(address(this), 1e30);
        _approve(address(this), address(escrow_), type(uint256).max);
    }

    function postOwnJob(ComputeEscrow.JobTerms calldata t) external {
        _inside = true;
        ownJob = escrow.postJob(t, 0, "");
        _inside = false;
    }

    function collect(address token, address to) external {
        _inside = true;
        escrow.withdraw(token, to);
        _inside = false;
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (_inside || address(escrow).code.length == 0) return;
        if (from != address(escrow) && to != address(escrow)) return;
        _inside = true;
        ++hooks;
        // Cancelling its own job moves nothing and may succeed; it leaves a credit for the next line to take.
        try escrow.cancelJob(ownJob) {} catch {}
        try escrow.withdraw(address(this), address(this)) {
            ++entered;
        } catch {}
        try escrow.topUp(bytes32(0), 1) {
            ++entered;
        } catch {}
        ComputeEscrow.JobTerms memory t;
        t.token = address(this);
        t.maxAmount = 1;
        t.claimBy = uint64(block.timestamp + 60);
        t.deliverSecs = 60;
        t.challengeSecs = 60;
        t.maxAttempts = 1;
        try escrow.postJob(t, 0, "") {
            ++entered;
        } catch {}
        _inside = false;
    }
}

/// @dev A client that refuses coin, and approves vouchers by ERC-1271 until told not to.
contract StubbornClient {
    address private immutable escrow;
    mapping(bytes32 digest => bool) public approved;

    constructor(address escrow_) payable {
        escrow = escrow_;
    }

    function approve(bytes32 digest, bool yes_) external {
        approved[digest] = yes_;
    }

    function isValidSignature(bytes32 digest, bytes calldata) external view returns (bytes4) {
        return approved[digest] ? this.isValidSignature.selector : bytes4(0);
    }

    function act(uint256 value, bytes calldata data) external returns (bytes memory) {
        (bool ok, bytes memory out) = escrow.call{value: value}(data);
        if (!ok) {
            assembly ("memory-safe") {
                revert(add(out, 32), mload(out))
            }
        }
        return out;
    }
}

/// @dev Code that refuses every call, ERC-1271 included.
contract Refuser {
    fallback() external payable {
        revert("refused");
    }
}

/// @dev Accepts the proof "good", fails on "boom", refuses the rest.
contract TestVerifier is IVerifier {
    function verify(bytes32, bytes calldata, bytes calldata proof) external pure returns (bool) {
        require(keccak256(proof) != keccak256("boom"), "boom");
        return keccak256(proof) == keccak256("good");
    }
}

/// @dev Rules as it was told; fails until then.
contract TestArbiter is IArbiter {
    bool public ready;
    bool private _hostWins;
    uint16 private _slashBps;

    function decide(bool ready_, bool hostWins, uint16 slashBps) external {
        (ready, _hostWins, _slashBps) = (ready_, hostWins, slashBps);
    }

    function rule(uint256) external view returns (bool, uint16) {
        require(ready, "no ruling");
        return (_hostWins, _slashBps);
    }
}
